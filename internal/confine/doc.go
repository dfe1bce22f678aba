// Package confine takes from the process what it does not need, for good and on all of its threads, once everything is open.
//
// # Theory of operation
//
// A guest or a front-end that finds a fault in vhostd has vhostd's rights. So there should be few of them. While it starts, vhostd opens its
// device, its sockets and its log; from then on it moves frames between descriptors. What it goes on needing is known and small: Needs says it,
// Apply takes the rest. Nothing that Apply takes can be had again, by this process or by any that it might start.
//
//	what              by what                          what is left
//	user, groups      setresuid, setresgid, setgroups  those of Needs.User
//	capabilities      bounding, ambient, inheritable,  Needs.Caps, as far as they were there
//	                  permitted and effective sets
//	privilege         no_new_privs                     set-user-ID programs give none
//	memory            PR_SET_DUMPABLE, RLIMIT_CORE     no core dump; no other process of the same user can read it or attach to it
//	files, TCP        Landlock                         the paths of Needs; TCP ports only with Inet
//	system calls      a seccomp filter                 calls.go: the base, and the groups of Needs.Use
//
// Landlock and seccomp see different things, and so do both jobs: seccomp sees numbers, and knows no paths; Landlock knows paths, and nothing of
// ioctl(2) on sockets or of bpf(2). io_uring's operations pass seccomp by and Landlock sees them, as far as they are about files: internal/sys/uring lets its
// rings do no other operations than its own, and after Apply there can be no new rings but with NewRing, which `vhostd serve` has for taps and tunnels
// that a reload opens. Of what the operations that are left can do, one thing is too much: a send that connects a TCP socket (MSG_FASTOPEN), where a
// tunnel and a socket that listened for metrics are in one process.
//
// # All threads
//
// Go has started threads before Apply, and starts more. Capabilities and Landlock are a thread's own, so they are changed on every thread by the
// runtime (syscall.AllThreadsSyscall); a seccomp filter is spread by the kernel (SECCOMP_FILTER_FLAG_TSYNC), which says if a thread could not
// take it. Threads that start later have what the thread has that starts them.
//
// # What a refused call does
//
// A call that is not listed fails with EPERM and is written to the kernel's log (audit type 1326, at a limited rate). The process lives on: the
// list is made from what Go's runtime and the libraries do today, an update of them may try something new for which it has another way, and a
// guest's network should not end for that. It is different with calls that no version of vhostd would make after its start and that whoever
// has taken it over would: execve, ptrace, mount, bpf, kexec_load, init_module and their like (deadly in calls.go). They end the process, so that
// it cannot be used to look for the one that works. The same call for another architecture's table (x32, i386) is refused.
//
// # Kernels
//
// Apply does what the kernel can. Linux 5.13 has Landlock, 6.2 the truncation of files, 6.7 TCP, 6.10 ioctl(2) on device nodes, 6.12 abstract UNIX
// sockets; version 9 of its interface, UNIX sockets by their paths. What is missing, and seccomp does not make up for, is in the Report, for the log;
// what is there and cannot be applied is an error.
//
// # Cost
//
// Calls that are allowed whatever their arguments are looked up in a bitmap of the kernel's (since Linux 5.11), without running the filter. The
// others run it: those that are frequent are never among them. BenchmarkFilter on an x86-64 virtual machine with Linux 6.18, processor time: a writev of
// 415 ns takes 30 to 80 more with the filter, as do ppoll and futex (most of it is that calls take the kernel's slower way in at all), an fcntl of 260,
// of which an argument is looked at, 75 more. A batch of frames is one call or none.
package confine
