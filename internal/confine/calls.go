package confine

import "golang.org/x/sys/unix"

// group is system calls that go together.
type group struct {
	use    Use    // 0: the base
	unless Use    // not with any of these, which have a group of their own for it
	what   string // for people
	// calls whatever their arguments are. A name that this architecture does not have (arm64 has no poll) is passed over.
	calls []string
	when  []call // calls with certain arguments
}

// call is a system call of which an argument is looked at: it has to be one of values or, where bits is not 0, to have one of these bits, or none
// of them.
type call struct {
	name   string
	arg    uint32
	values []uint32
	bits   uint32
	clear  bool // none of bits
}

// ownProcess stands for the process's own identity, which is known when the filter is made.
const ownProcess = ^uint32(0)

// prSetVMA is PR_SET_VMA: Go's runtime gives its mappings names.
const prSetVMA = 0x53564d41

// groups is all that is ever allowed.
var groups = []group{
	{what: "moving frames between descriptors, and Go's runtime", calls: []string{
		"futex", "ppoll", "read", "write", "readv", "preadv2", "writev", "recvmsg", "recvmmsg", "recvfrom",
		"epoll_pwait", "epoll_wait", "nanosleep", "sched_yield", "poll", "clock_nanosleep", "clock_gettime", "gettimeofday",
		"rt_sigreturn", "rt_sigprocmask", "rt_sigaction", "sigaltstack", "restart_syscall",
		"madvise", "munmap", "mremap", "mincore", "sched_getaffinity", "getpid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getppid", "getcpu", "getrandom", "getrusage",
		"exit", "exit_group", "close", "dup", "dup3", "fstat", "lseek", "pread64", "pwrite64",
		// Front-ends come and go.
		"accept4", "getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown",
		"eventfd2", "epoll_create1", "epoll_ctl", "pipe2",
		// What files are, which Landlock does not hide.
		"newfstatat", "statx", "fstatfs", "readlinkat",
	}, when: []call{
		{name: "clone", arg: 0, bits: unix.CLONE_THREAD},
		{name: "tgkill", arg: 0, values: []uint32{ownProcess}},
		{name: "mmap", arg: 2, bits: unix.PROT_EXEC, clear: true},
		{name: "mprotect", arg: 2, bits: unix.PROT_EXEC, clear: true},
		{name: "prctl", arg: 0, values: []uint32{prSetVMA, unix.PR_GET_SECCOMP, unix.PR_GET_NO_NEW_PRIVS}},
		{name: "fcntl", arg: 1, values: []uint32{
			unix.F_DUPFD, unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_GET_SEALS,
		}},
		{name: "ioctl", arg: 1, values: []uint32{
			unix.TUNSETQUEUE, unix.TUNSETOFFLOAD, unix.TUNGETIFF, unix.TUNGETSNDBUF, unix.TUNGETVNETHDRSZ, unix.TUNGETFEATURES,
			unix.SIOCGIFINDEX, unix.SIOCGIFNAME, unix.SIOCGIFMTU, unix.SIOCGIFHWADDR, unix.SIOCGIFFLAGS, unix.SIOCOUTQ, unix.SIOCINQ,
		}},
	}},
	{unless: Metrics, what: "sending", calls: []string{"sendmsg", "sendmmsg", "sendto"}},
	{use: Inet, what: "new sockets of TCP, UDP and ICMP", calls: []string{"connect", "sendmsg", "sendmmsg", "sendto"}, when: []call{
		{name: "socket", arg: 0, values: []uint32{unix.AF_INET, unix.AF_INET6}},
	}},
	{use: Unix, what: "new connections to UNIX sockets", calls: []string{"connect"}, when: []call{
		{name: "socket", arg: 0, values: []uint32{unix.AF_UNIX}},
	}},
	{use: Packet, what: "new packet sockets", calls: []string{"bind"}, when: []call{
		{name: "socket", arg: 0, values: []uint32{unix.AF_PACKET, unix.AF_NETLINK}},
	}},
	{use: XDP, what: "new AF_XDP sockets", calls: []string{"bind", "membarrier"}, when: []call{
		{name: "socket", arg: 0, values: []uint32{unix.AF_XDP}},
		{name: "bpf", arg: 0, values: []uint32{unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM}},
	}},
	{use: Ring, what: "requests through io_uring", calls: []string{"io_uring_enter", "io_uring_register"}},
	{use: NewRing, what: "new io_uring rings", calls: []string{"io_uring_setup"}},
	// There is a TCP socket then, one that listens. MSG_FASTOPEN would connect it, which Landlock does not see.
	{use: Metrics, what: "reading about the process", calls: []string{"statfs"}, when: []call{
		{name: "sendto", arg: 3, bits: unix.MSG_FASTOPEN, clear: true},
		{name: "sendmsg", arg: 2, bits: unix.MSG_FASTOPEN, clear: true},
		{name: "sendmmsg", arg: 3, bits: unix.MSG_FASTOPEN, clear: true},
	}},
	{use: Profile, what: "Go's profiles", calls: []string{"setitimer", "timer_create", "timer_settime", "timer_delete"}},
	{use: Open, what: "new devices and sockets", calls: []string{
		"bind", "listen", "connect", "sendmsg", "sendmmsg", "sendto", "fchown", "fchownat", "chown", "lchown", "umask", "membarrier", "uname",
	}, when: []call{
		// Those with addresses are Inet's: not all that they do is seen by Landlock (MPTCP).
		{name: "socket", arg: 0, values: []uint32{unix.AF_UNIX, unix.AF_NETLINK, unix.AF_PACKET}},
		{name: "fchmod", arg: 1, bits: setID, clear: true},
		{name: "fchmodat", arg: 2, bits: setID, clear: true},
		{name: "chmod", arg: 1, bits: setID, clear: true},
		{name: "ioctl", arg: 1, values: []uint32{
			unix.TUNSETIFF, unix.TUNSETPERSIST, unix.TUNSETVNETHDRSZ, unix.TUNSETVNETLE, unix.TUNSETSNDBUF, unix.TUNSETOWNER, unix.TUNSETGROUP,
			unix.SIOCSIFMTU, unix.SIOCETHTOOL, unix.SIOCSIFFLAGS,
		}},
	}},
}

// setID are the permissions that make a program of a file's owner or group: what this process leaves behind must not be one.
const setID = unix.S_ISUID | unix.S_ISGID

// Groups that paths need: which of the lists of Needs, and what for.
var (
	openGroup = group{what: "opening files", calls: []string{"getdents64", "fadvise64"}, when: []call{
		{name: "openat", arg: 3, bits: setID, clear: true},
		{name: "open", arg: 2, bits: setID, clear: true},
	}}
	removeGroup = group{what: "removing files", calls: []string{"unlinkat", "unlink"}}
)

// deadly are calls that end the process: see the package comment.
var deadly = []string{
	"execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp",
	"mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "mount_setattr",
	"setns", "unshare", "bpf", "perf_event_open", "userfaultfd", "open_by_handle_at",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
	"keyctl", "add_key", "request_key", "personality", "acct", "quotactl", "iopl", "ioperm", "modify_ldt",
	"setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid", "capset",
	"settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "sethostname", "setdomainname", "mknod", "mknodat",
}
