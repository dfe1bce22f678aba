package confine

import (
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// needKernel skips where the kernel has not all that is tested here: these tests want to see refusals, not reports.
func needKernel(t *testing.T) {
	t.Helper()
	require.Root(t, "confine")
	if require.Race || cgo {
		t.Skip("skipped: the runtime of the race detector, or of cgo, is no vhostd") // it maps memory and starts threads in ways of its own
	}
	if s := Supported(); !s.Seccomp || s.Landlock < 6 {
		require.Skip(t, "confine", "seccomp %v, Landlock version %d (%v), want 6", s.Seccomp, s.Landlock, s.LandlockErr)
	}
}

// listenTCP accepts whoever comes.
func listenTCP(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return l.Addr().String()
}

// TestRefused: on every thread, whether it was there before or not, each attempt fails once the process is confined, with the needs that
// are beside it. Without, none of them is refused, so that the test shows what it says.
func TestRefused(t *testing.T) {
	needKernel(t)
	const seccomp, landlock = "EPERM", "EACCES"
	file, address := tempFile(t), listenTCP(t)
	dir := filepath.Dir(file)
	for name, c := range map[string]struct {
		needs Needs
		want  map[string]string // by attempt; "" for one that is needed
	}{
		"nothing": {Needs{}, map[string]string{
			"read the file": seccomp, "write the file": seccomp, "make a file": seccomp, "truncate the file": seccomp,
			"rename the file": seccomp, "remove the file": seccomp, "change its mode": seccomp, "change its owner": seccomp, "make a link": seccomp,
			"make a directory": seccomp, "read /etc/shadow": seccomp, "list /": seccomp, "open /dev/net/tun": seccomp, "listen on a path": seccomp,
			"listen for TCP": seccomp, "connect by TCP": seccomp, "connect by MPTCP": seccomp, "open a UDP socket": seccomp, "AF_PACKET": seccomp,
			"AF_NETLINK": seccomp, "AF_XDP": seccomp, "AF_UNIX": seccomp, "raw socket": seccomp, "start a program": seccomp,
			"signal the parent": seccomp, "signal a thread": seccomp, "executable memory": seccomp, "make it executable": seccomp,
			"an io_uring": seccomp, "be dumpable": seccomp, "raise core's limit": seccomp, "early TCP connect": seccomp,
			"type into terminal": seccomp, "own a descriptor": seccomp, "lower its nice": seccomp, "send to a path": seccomp,
			"memory": "", "signal itself": "", "stat the file": "",
		}},
		"a directory to read": {Needs{Read: []string{dir, "/no/such/directory"}}, map[string]string{
			"read the file": "", "write the file": landlock, "make a file": landlock, "truncate the file": seccomp, "remove the file": seccomp,
			"read /etc/shadow": landlock, "list /": landlock, "open /dev/net/tun": landlock,
		}},
		"a file to read": {Needs{Read: []string{file}}, map[string]string{
			"read the file": "", "write the file": landlock, "read /etc/shadow": landlock,
		}},
		"a directory to remove from": {Needs{Remove: []string{"/etc/none", "/usr"}}, map[string]string{
			"remove the file": landlock, "read the file": seccomp,
		}},
		"a device": {Needs{Devices: []string{"/dev/net/tun"}}, map[string]string{
			"open /dev/net/tun": "", "read the file": landlock, "make a file": landlock,
		}},
		"addresses": {Needs{Use: Inet}, map[string]string{
			"connect by TCP": "", "open a UDP socket": "", "early TCP connect": "", "listen for TCP": seccomp, "raw socket": seccomp,
			"AF_PACKET": seccomp, "AF_UNIX": seccomp, "read /etc/shadow": seccomp,
		}},
		"UNIX sockets": {Needs{Use: Unix}, map[string]string{
			"AF_UNIX": "", "connect by TCP": seccomp, "early TCP connect": landlock, "listen on a path": seccomp,
		}},
		"metrics": {Needs{Use: Metrics}, map[string]string{
			"connect by sending": seccomp, "early TCP connect": seccomp, "send to a path": seccomp, "read /etc/shadow": landlock,
		}},
		"packet sockets":                         {Needs{Use: Packet, Caps: CapNetRaw}, map[string]string{"AF_PACKET": "", "AF_INET": seccomp, "AF_XDP": seccomp}},
		"packet sockets, without the capability": {Needs{Use: Packet}, map[string]string{"AF_PACKET": seccomp}},
		"opening": {Needs{Use: Open, Make: []string{dir}}, map[string]string{
			"listen on a path": "", "AF_NETLINK": "", "make a file": landlock, "write the file": landlock, "change its mode": "", "read /etc/shadow": landlock,
			"open /dev/net/tun": landlock, "leave a set-user-ID": seccomp, "make a set-user-ID": seccomp, "start a program": seccomp, "AF_PACKET": seccomp,
			"connect by TCP": seccomp, "connect by MPTCP": seccomp, "early TCP connect": landlock, "listen for TCP": seccomp, "open a UDP socket": seccomp,
			"an io_uring": seccomp,
		}},
		"opening, with addresses": {Needs{Use: Open | Inet}, map[string]string{
			"connect by TCP": "", "listen for TCP": "", "open a UDP socket": "", "an io_uring": seccomp,
		}},
		"opening, with rings": {Needs{Use: Open | Ring | NewRing, Make: []string{dir}}, map[string]string{
			"an io_uring": "", "make a set-user-ID by io_uring": landlock, "connect by TCP": seccomp,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			o := order{Confine: true, Needs: c.needs, Tries: slices.Sorted(maps.Keys(c.want)), File: file, Addr: address}
			defer restore(file)
			for try, got := range do(t, o, 0).Errors {
				for i, err := range got {
					if err != c.want[try] {
						t.Errorf("%s: %q on thread %d, want %q", try, err, i, c.want[try])
					}
				}
			}
		})
	}
}

// TestOtherSockets: who connects to one UNIX socket cannot connect to another, or the report says that this kernel does not see to it.
func TestOtherSockets(t *testing.T) {
	needKernel(t)
	file := tempFile(t) + ".sock"
	l, err := net.Listen("unix", file)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o := order{Confine: true, Needs: Needs{Use: Unix, Connect: []string{"/run/vhostd/vm.sock"}}, Tries: []string{"connect to the file"}, File: file}
	out := do(t, o, 0)
	said := strings.Contains(strings.Join(out.Report.Newer, "\n"), "UNIX sockets")
	for i, err := range out.Errors["connect to the file"] {
		if refused := err == "EACCES"; refused == said {
			t.Errorf("another socket is refused: %v (%q) on thread %d; the report says so: %v", refused, err, i, said)
		}
	}
}

// deadlyTries are attempts that end the process.
var deadlyTries = []string{
	"execve", "ptrace", "process_vm_readv", "mount", "bpf", "userfaultfd", "init_module", "kexec_load", "open_by_handle_at", "keyctl",
	"unshare", "setns", "setuid", "capset", "perf_event_open",
}

// TestDeadly: what only an intruder would call ends the process, on whatever thread.
func TestDeadly(t *testing.T) {
	needKernel(t)
	for _, try := range deadlyTries {
		t.Run(try, func(t *testing.T) {
			t.Parallel()
			cmd := helper(t, order{Confine: true, Needs: Needs{Use: ^Use(0) &^ XDP}, Tries: []string{try}}, 0)
			_ = cmd.Run()
			if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != unix.SIGSYS {
				t.Errorf("the process ended with %v, want SIGSYS", cmd.ProcessState)
			}
		})
	}
}

// TestAttemptsAreReal: unconfined, the kernel carries out what the other tests try, or finds fault with its arguments; it refuses nothing.
func TestAttemptsAreReal(t *testing.T) {
	needKernel(t)
	var tries []string
	for try := range attempts {
		if try != "execve" && try != "connect to the file" {
			tries = append(tries, try)
		}
	}
	slices.Sort(tries)
	out := do(t, order{Tries: tries, File: tempFile(t), Addr: listenTCP(t)}, 0)
	for try, errs := range out.Errors {
		if slices.Contains(errs, "EPERM") || slices.Contains(errs, "EACCES") {
			t.Errorf("%s is refused without vhostd's doing: %q", try, errs)
		}
	}
}

// status returns a field of each thread of a process.
func status(t *testing.T, pid int, field string) (values []string) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) < 3 {
		t.Fatalf("%d threads (%v), want several", len(tasks), err)
	}
	for _, path := range tasks {
		b, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), "\n"+field+":")
		line, _, _ := strings.Cut(rest, "\n")
		values = append(values, strings.TrimSpace(line))
	}
	return values
}

// stay starts a helper that confines itself and then waits.
func stay(t *testing.T, n Needs) (pid int, out string) {
	t.Helper()
	cmd := helper(t, order{Confine: true, Needs: n, Stay: true}, 0)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	b := make([]byte, 4096)
	got, err := stdout.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, string(b[:got])
}

// TestAllThreads: the kernel says of every thread what has been taken from it.
func TestAllThreads(t *testing.T) {
	needKernel(t)
	nobody := &User{UID: 65534, GID: 65533, Groups: []int{65532}}
	for name, c := range map[string]struct {
		needs Needs
		want  map[string]string
	}{
		"nothing": {Needs{}, map[string]string{
			"Seccomp": "2", "NoNewPrivs": "1", "CapInh": zeroCaps, "CapPrm": zeroCaps, "CapEff": zeroCaps, "CapBnd": zeroCaps, "CapAmb": zeroCaps,
		}},
		"capabilities": {Needs{Caps: CapNetRaw | CapIPCLock}, map[string]string{
			"CapInh": zeroCaps, "CapPrm": "0000000000006000", "CapEff": "0000000000006000", "CapBnd": "0000000000006000", "CapAmb": zeroCaps,
		}},
		"user": {Needs{User: nobody}, map[string]string{
			"Uid": "65534\t65534\t65534\t65534", "Gid": "65533\t65533\t65533\t65533", "Groups": "65532", "CapPrm": zeroCaps, "CapEff": zeroCaps, "Seccomp": "2",
		}},
		"user with a capability": {Needs{User: nobody, Caps: CapNetRaw}, map[string]string{
			"Uid": "65534\t65534\t65534\t65534", "CapPrm": "0000000000002000", "CapEff": "0000000000002000",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			pid, _ := stay(t, c.needs)
			for field, want := range c.want {
				for _, got := range status(t, pid, field) {
					if got != want {
						t.Errorf("%s is %q on a thread, want %q", field, got, want)
					}
				}
			}
		})
	}
}

const zeroCaps = "0000000000000000"

// TestNeighbourCannotLook: another process of the same user, such as another vhostd's, cannot read the memory of a confined one.
func TestNeighbourCannotLook(t *testing.T) {
	needKernel(t)
	pid, _ := stay(t, Needs{User: &User{UID: 65534, GID: 65534, Groups: []int{65534}}})
	mem := fmt.Sprintf("/proc/%d/mem", pid)
	out := do(t, order{Tries: []string{"read the file"}, File: mem}, 65534)
	for _, err := range out.Errors["read the file"] {
		if err != "EACCES" {
			t.Errorf("opening %s: %q, want EACCES", mem, err)
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 bytes") {
		t.Errorf("a core file may be written:\n%s", limits)
	}
}

// TestOrdinaryUser: somebody without privilege can confine himself as well.
func TestOrdinaryUser(t *testing.T) {
	needKernel(t)
	file := tempFile(t)
	o := order{Confine: true, Needs: Needs{Read: []string{filepath.Dir(file)}, Caps: CapNetAdmin}, Tries: []string{"read the file", "list /", "AF_INET"}, File: file}
	out := do(t, o, 65534)
	if e := out.Errors; e["read the file"][2] != "" || e["list /"][0] != "EACCES" || out.Report.Caps != 0 || out.Report.Landlock == 0 || !out.Report.Seccomp {
		t.Errorf("%+v", out)
	}
}

// TestOnlyRootChangesTheUser: an ordinary user who asks for another is told so.
func TestOnlyRootChangesTheUser(t *testing.T) {
	needKernel(t)
	cmd := helper(t, order{Confine: true, Needs: Needs{User: &User{UID: 1, GID: 1}}}, 65534)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(stderr)
	if cmd.Wait() == nil || !strings.Contains(string(text), "only root can change the user") {
		t.Errorf("%s", text)
	}
}
