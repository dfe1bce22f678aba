package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A process cannot be let out again, so each test has a process of its own: this test binary, which finds an order in its environment.
const orderEnv = "VHOSTD_TEST_CONFINE"

// order is what a helper is to do.
type order struct {
	Confine bool
	Needs   Needs
	Tries   []string // names of attempts
	File    string   // that the attempts have in mind
	Addr    string   // where somebody listens for TCP
	Stay    bool     // until standard input ends
}

// outcome is what the helper saw: for each attempt the error on each of its threads, "" for none.
type outcome struct {
	Report Report
	Errors map[string][]string
}

func TestMain(m *testing.M) {
	if text := os.Getenv(orderEnv); text != "" {
		os.Exit(obey(text))
	}
	if os.Getenv(benchEnv) != "" {
		os.Exit(measure())
	}
	os.Exit(m.Run())
}

// obey is the helper. Attempts are made on a thread that was there before Apply, on one that calls it, and on one that started later.
func obey(text string) int {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := prepare(o.File); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	before := thread()
	out := outcome{Errors: map[string][]string{}}
	if o.Confine {
		var err error
		if out.Report, err = Apply(o.Needs); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	after := thread()
	for _, name := range o.Tries {
		for _, run := range []func(func()){before, func(f func()) { f() }, after} {
			if !o.Confine {
				restore(o.File)
			}
			run(func() { out.Errors[name] = append(out.Errors[name], errText(attempts[name](o))) })
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(out)
	if o.Stay {
		_, _ = os.Stdin.Read(make([]byte, 1))
	}
	return 0
}

// thread starts a thread and returns what runs a function on it.
func thread() func(func()) {
	work, done := make(chan func()), make(chan bool)
	go func() {
		runtime.LockOSThread()
		done <- true
		for f := range work {
			f()
			done <- true
		}
	}()
	<-done
	return func(f func()) {
		work <- f
		<-done
	}
}

func errText(err error) string {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// restore makes the file what it was before the last attempt.
func restore(file string) {
	for _, suffix := range []string{"", ".new", ".link", ".dir"} {
		_ = os.Remove(file + suffix)
	}
	_ = os.WriteFile(file, []byte("secret"), 0o666)
}

// early are TCP sockets that were opened before Apply, and listening ones that listen, one for each thread.
var early, listening []int

// prepare opens them, and listens for datagrams beside the file.
func prepare(file string) error {
	for range 3 {
		for _, fds := range []*[]int{&early, &listening} {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			*fds = append(*fds, fd)
		}
		if err := unix.Listen(listening[len(listening)-1], 1); err != nil {
			return err
		}
	}
	if file == "" {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_ = os.Remove(file + ".dgram")
	_ = unix.Bind(fd, &unix.SockaddrUnix{Name: file + ".dgram"}) // where this user can
	return nil
}

func raw(nr, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall6(nr, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func socket(family, kind, proto int) error {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func closed[T interface{ Close() error }](c T, err error) error {
	if err == nil {
		c.Close()
	}
	return err
}

func protect(prot int) error {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer unix.Munmap(b) //nolint:errcheck // of a page
	return unix.Mprotect(b, prot)
}

// attempts are what a process that has been taken over might try.
var attempts = map[string]func(o order) error{
	"read the file":     func(o order) error { _, err := os.ReadFile(o.File); return err },
	"stat the file":     func(o order) error { _, err := os.Stat(o.File); return err },
	"write the file":    func(o order) error { return os.WriteFile(o.File, nil, 0o600) },
	"make a file":       func(o order) error { return os.WriteFile(o.File+".new", nil, 0o600) },
	"truncate the file": func(o order) error { return os.Truncate(o.File, 0) },
	"rename the file":   func(o order) error { return os.Rename(o.File, o.File) },
	"remove the file":   func(o order) error { return os.Remove(o.File) },
	"change its mode":   func(o order) error { return os.Chmod(o.File, 0o600) },
	"change its owner":  func(o order) error { return os.Lchown(o.File, 0, 0) },
	"make a link":       func(o order) error { return os.Symlink("x", o.File+".link") },
	"make a directory":  func(o order) error { return os.Mkdir(o.File+".dir", 0o700) },
	"read /etc/shadow":  func(order) error { _, err := os.ReadFile("/etc/shadow"); return err },
	"list /":            func(order) error { _, err := os.ReadDir("/"); return err },
	"open /dev/net/tun": func(order) error { return closed(os.OpenFile("/dev/net/tun", os.O_RDWR, 0)) },
	"listen on a path":  func(o order) error { os.Remove(o.File); return closed(net.Listen("unix", o.File)) },
	"listen for TCP":    func(order) error { return closed(net.Listen("tcp4", "127.0.0.1:0")) },
	"connect by TCP":    func(o order) error { return closed(net.Dial("tcp4", o.Addr)) },
	"connect by MPTCP":  func(o order) error { d := net.Dialer{}; d.SetMultipathTCP(true); return closed(d.Dial("tcp4", o.Addr)) },
	"open a UDP socket": func(order) error { return closed(net.Dial("udp4", "127.0.0.1:9")) },
	"AF_PACKET":         func(order) error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
	"AF_NETLINK":        func(order) error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, 0) },
	"AF_XDP":            func(order) error { return socket(unix.AF_XDP, unix.SOCK_RAW, 0) },
	"AF_UNIX":           func(order) error { return socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) },
	"AF_INET":           func(order) error { return socket(unix.AF_INET, unix.SOCK_STREAM, 0) },
	"raw socket":        func(order) error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) },
	"start a program":   func(order) error { return spawn() },
	"signal the parent": func(order) error { return unix.Kill(os.Getppid(), 0) },
	"signal a thread":   func(order) error { return unix.Tgkill(os.Getppid(), os.Getppid(), 0) },
	"signal itself":     func(order) error { return unix.Tgkill(os.Getpid(), os.Getpid(), 0) },
	"executable memory": func(order) error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	},
	"memory": func(order) error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	},
	"make it executable":  func(order) error { return protect(unix.PROT_READ | unix.PROT_EXEC) },
	"an io_uring":         func(order) error { var p [120]byte; return raw(unix.SYS_IO_URING_SETUP, 4, addr(&p[0]), 0) },
	"be dumpable":         func(order) error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) },
	"raise core's limit":  func(order) error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}) },
	"early TCP connect":   func(o order) error { return connectEarly(o.Addr) },
	"type into terminal":  func(order) error { return unix.IoctlSetPointerInt(0, unix.TIOCSTI, 'x') },
	"own a descriptor":    func(order) error { _, err := unix.FcntlInt(0, unix.F_SETOWN, os.Getpid()); return err },
	"lower its nice":      func(order) error { return unix.Setpriority(unix.PRIO_PROCESS, 0, -1) },
	"connect by sending":  func(o order) error { return connectBySending(o.Addr) },
	"send to a path":      func(o order) error { return sendToPath(o.File + ".dgram") },
	"leave a set-user-ID": func(o order) error { return os.Chmod(o.File, 0o755|os.ModeSetuid) },
	"make a set-user-ID": func(o order) error {
		return closed(os.OpenFile(o.File+".new", os.O_WRONLY|os.O_CREATE, 0o755|os.ModeSetuid))
	},
	"make a set-user-ID by io_uring": func(o order) error { return openByRing(o.File+".new", 0o4755) },
	"connect to the file":            func(o order) error { return closed(net.Dial("unix", o.File)) },

	// Those that end the process.
	"execve":            func(order) error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"ptrace":            func(order) error { return raw(unix.SYS_PTRACE, unix.PTRACE_CONT, uintptr(os.Getppid()), 0) },
	"process_vm_readv":  func(order) error { return peek() },
	"mount":             func(order) error { return unix.Mount("none", "/proc", "none", 0, "") },
	"bpf":               func(order) error { return raw(unix.SYS_BPF, unix.BPF_MAP_CREATE, 0, 0) },
	"userfaultfd":       func(order) error { return raw(unix.SYS_USERFAULTFD, 1, 0, 0) },
	"init_module":       func(order) error { return raw(unix.SYS_INIT_MODULE, 0, 0, 0) },
	"kexec_load":        func(order) error { return raw(unix.SYS_KEXEC_LOAD, 0, 17, 0) },
	"open_by_handle_at": func(order) error { return raw(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0) },
	"keyctl":            func(order) error { return raw(unix.SYS_KEYCTL, 0, 0, 0) },
	"unshare":           func(order) error { return unix.Unshare(unix.CLONE_NEWUTS) },
	"setns":             func(order) error { return unix.Setns(0, 0) },
	"setuid":            func(order) error { return raw(unix.SYS_SETUID, 0, 0, 0) },
	"capset":            func(order) error { return raise() },
	"perf_event_open":   func(order) error { return raw(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0) },
}

// spawn starts a program, without opening a file as os/exec does.
func spawn() error {
	pid, err := syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{})
	if err == nil {
		_, err = syscall.Wait4(pid, nil, 0, nil)
	}
	return err
}

func connectEarly(to string) error {
	a, err := inet4(to)
	if err != nil {
		return err
	}
	fd := early[0]
	early = early[1:]
	return unix.Connect(fd, a)
}

func inet4(address string) (*unix.SockaddrInet4, error) {
	a, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return nil, err
	}
	return &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())}, nil
}

// connectBySending has a socket that listened connect, without connect(2).
func connectBySending(to string) error {
	a, err := inet4(to)
	if err != nil {
		return err
	}
	fd := listening[0]
	listening = listening[1:]
	if err := unix.Shutdown(fd, unix.SHUT_RD); err != nil {
		return err
	}
	return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, a)
}

// sendToPath sends a datagram without a socket of socket(2).
func sendToPath(path string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	return unix.Sendto(pair[0], []byte("hello"), unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: path})
}

// helper starts a helper, as another user if uid is not 0.
func helper(t *testing.T, o order, uid uint32) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(executable(t, uid))
	cmd.Env = append(os.Environ(), orderEnv+"="+string(text))
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return cmd
}

// executable is this program, as a file that the user may execute.
func executable(t *testing.T, uid uint32) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if uid == 0 {
		return self
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	path := tempFile(t) + ".exe"
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// do has a helper do what it is told to its end.
func do(t *testing.T, o order, uid uint32) outcome {
	t.Helper()
	cmd := helper(t, o, uid)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		t.Fatalf("helper: %v\n%s", err, stderr.String())
	}
	var out outcome
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	return out
}

// tempFile is a file in a directory that every user can come to.
func tempFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "confine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}
