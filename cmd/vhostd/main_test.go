package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
)

// patience bounds every wait. It is no measure of speed: nothing but a hang takes that long.
const patience = 30 * time.Second

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	code := func() int {
		dir, err := os.MkdirTemp("", "vhostd-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "vhostd")
		build := exec.Command("go", "build", "-o", binary, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building vhostd: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}()
	os.Exit(code)
}

// result is how a program ended.
type result struct {
	code           int
	stdout, stderr string
}

// command runs vhostd to its end.
func command(t *testing.T, args ...string) result {
	t.Helper()
	return finish(t, exec.CommandContext(t.Context(), binary, args...))
}

func finish(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// buffer is a bytes.Buffer for a writer and readers at the same time.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is a vhostd that runs.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout buffer
	stderr buffer
	ended  chan struct{}
	code   int // after ended
}

// start starts vhostd run and waits until it is ready. It is killed at the end of the test, if it has not ended before.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	return launch(t, exec.Command(binary, append([]string{"run"}, args...)...))
}

func launch(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.stdout, &p.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = cmd.Wait()
		p.code = cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		if t.Failed() { // what is it doing?
			_ = cmd.Process.Signal(syscall.SIGQUIT)
			select {
			case <-p.ended:
			case <-time.After(5 * time.Second):
			}
		}
		_ = cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("%v\nstdout:\n%s\nstderr:\n%s", cmd.Args, p.stdout.String(), p.stderr.String())
		}
	})
	p.waitLog("ready")
	return p
}

// waitLog waits until the log has the words.
func (p *process) waitLog(words string) {
	p.t.Helper()
	eventually(p.t, "the log says "+words, func() bool {
		select {
		case <-p.ended:
			if !strings.Contains(p.stderr.String(), words) {
				p.t.Fatalf("vhostd ended with code %d and did not say %q", p.code, words)
			}
		default:
		}
		return strings.Contains(p.stderr.String(), words)
	})
}

// end sends a signal and returns the exit code.
func (p *process) end(sig syscall.Signal) int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
	return p.wait()
}

func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("vhostd did not end within %v", patience)
	}
	return p.code
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// socketIn is a path for a socket in a directory of the test's own, short enough for one.
func socketIn(t *testing.T) string {
	t.Helper()
	return filepath.Join(vhosttest.ShortDir(t), "vm.sock")
}

func listenOn(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestUsage: a command line that cannot be understood ends with code 2, says why, and where to look.
func TestUsage(t *testing.T) {
	for line, want := range map[string]string{
		"sing":                          `unknown command "sing"`,
		"run":                           "--socket-path is needed",
		"run --sing":                    "unknown flag: --sing",
		"run -x":                        "unknown shorthand flag",
		"run --socket-path s extra":     `takes options only, not "extra"`,
		"run --socket-path s --net foo": `unknown kind "foo", known are user, tap, packet, xdp, null, vxlan, geneve, dgram`,
		"run --socket-path s --net vxlan:remote=10.0.0.2":                                 "vni=N is missing",
		"run --socket-path s --queues 2 --net dgram:local=127.0.0.1:1,remote=127.0.0.1:2": "dgram has one queue pair",
		"run --socket-path s --net null,x":                                                `"x": want KEY=VALUE, of generate=on|off, size=BYTES`,
		"run --socket-path s --net null,echo=on,size=100":                                 "echo=on goes with no other option",
		"run --socket-path s --net null,size=9":                                           "must be 14 to",
		"run --socket-path s --net null,generate=x":                                       "want on or off",
		"run --socket-path s --net tap:a,sing=1":                                          `unknown key "sing"`,
		"run --socket-path s --net tap:a,queues=2 --queues 3":                             "--queues 3 contradicts",
		"run --socket-path s --net packet":                                                "no interface name",
		"run --socket-path s --net packet:a,queues=2 --queues 3":                          "--queues 3 contradicts",
		"run --socket-path s --net user,sing=1":                                           `unknown option "sing"`,
		"run --socket-path s --net user --hostfwd sing":                                   "hostfwd",
		"run --socket-path s --net null --hostfwd tcp::1-:1":                              "--hostfwd is for --net user",
		"run --socket-path s --fd 3":                                                      "--fd excludes --socket-path",
		"run --fd 3 --socket-mode 0660":                                                   "are for a socket that vhostd makes",
		"run --fd -2":                                                                     "--fd -2",
		"run --client --fd 3":                                                             "--fd excludes",
		"run --socket-path s --mac 52:54":                                                 "--mac",
		"run --socket-path s --mac 01:00:5e:00:00:01":                                     "multicast",
		"run --socket-path s --mac 00:00:00:00:00:00":                                     "no address",
		"run --socket-path s --mtu x":                                                     "--mtu",
		"run --socket-path s --queues 0":                                                  "--queues 0",
		"run --socket-path s --poll -1s":                                                  "--poll -1s",
		"run --socket-path s --disable-features SING":                                     `unknown feature "SING"`,
		"run --socket-path s --disable-features PROTOCOL_FEATURES":                        "unknown feature",
		"run --socket-path s --socket-mode 999":                                           "--socket-mode",
		"run --socket-path s --socket-mode 0":                                             "--socket-mode",
		"run --socket-path s --socket-group nobody-has-this":                              "no such group",
		"run --socket-path s --client --socket-mode 0600":                                 "the socket is the VMM's",
		"run --socket-path s --client --socket-owner 0":                                   "the socket is the VMM's",
		"run --socket-path s --socket-owner nobody-has-this":                              `--socket-owner "nobody-has-this": there is no such user`,
		"run --socket-path s --allow-uid 0,nobody-has-this":                               `--allow-uid "nobody-has-this": there is no such user`,
		"run --socket-path s --socket-owner 0:12":                                         `--socket-owner "0:12": want a user alone`,
		"run --socket-path s --allow-uid 0,7:12":                                          `--allow-uid "7:12": want a user alone`,
		"run --socket-path s --allow-gid nobody-has-this":                                 `--allow-gid "nobody-has-this": there is no such group`,
		"run --socket-path s --user nobody-has-this":                                      `--user "nobody-has-this": there is no such user`,
		"run --socket-path s --user 1:nobody-has-this":                                    `--user "nobody-has-this": there is no such group`,
		"run --socket-path s --user 1 --no-sandbox":                                       "--no-sandbox excludes --user",
		"run --socket-path s --log-format xml":                                            "text or json",
		"run --socket-path s --log-level loud":                                            "debug, info, warn or error",
		"run --socket-path s --pprof":                                                     "--pprof needs --metrics",
		"stats":                                                                           "--socket-path",
		"serve":                                                                           "--config is needed",
		"check":                                                                           "--config is needed",
		"reload":                                                                          "vhostd: --config or --control is needed",
		"stats --socket-path s --config c":                                                "say which one to ask",
		"reload --socket-path s":                                                          "unknown flag: --socket-path",
		"stats --socket-path s --interval 1us":                                            "--interval",
		"bench":                                                                           "--socket-path is needed",
		"bench --socket-path s --ring round":                                              `--ring "round": want split or packed`,
		"bench --socket-path s --size 100":                                                "queue size 100, must be a power of two",
		"bench --socket-path s --mrg-rxbuf maybe":                                         "--mrg-rxbuf \"maybe\": want on or off",
		"bench --socket-path s --event-idx 1":                                             "--event-idx \"1\": want on or off",
		"bench --socket-path s --frame 64,x":                                              `--frame "64,x": "x" is no length in bytes`,
		"bench --socket-path s --memory disk":                                             "want memfd or hugetlb",
		"bench --socket-path s --cold 5T":                                                 "up to 64G",
		"bench --socket-path s --cold 65G":                                                "up to 64G",
		"bench --socket-path s --window 4":                                                "--window is for --direction echo or through",
		"bench --socket-path s --indirect":                                                "at least 2 descriptors",
		"doctor me":                                                                       "takes options only",
		"man":                                                                             "--dir is needed",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			got := command(t, strings.Fields(line)...)
			if got.code != exitUsage || !strings.Contains(got.stderr, want) || !strings.Contains(got.stderr, "--help") || got.stdout != "" {
				t.Errorf("code %d, stdout %q, stderr %q; want code %d and %q", got.code, got.stdout, got.stderr, exitUsage, want)
			}
		})
	}
}

// TestHelpNamesTheUnitsFile: whoever does as the help says gets a daemon that can read its file again, which one in /etc itself cannot.
func TestHelpNamesTheUnitsFile(t *testing.T) {
	unit, err := os.ReadFile("../../contrib/vhostd-serve.service")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, cmd := range append(newRoot().Commands(), newRoot()) {
		for _, m := range regexp.MustCompile(`--config (/\S+)`).FindAllStringSubmatch(cmd.Long+"\n"+cmd.Example, -1) {
			if named++; !strings.Contains(string(unit), "serve --config "+m[1]+"\n") || filepath.Dir(m[1]) == "/etc" {
				t.Errorf("the help of %s names %s", cmd.Name(), m[1])
			}
		}
	}
	if named < 4 {
		t.Errorf("%d files found in the help: this test has stopped looking", named)
	}
}

// TestFailures: what is understood and cannot be done ends with code 1, says why and what to do, and leaves nothing behind.
func TestFailures(t *testing.T) {
	used := socketIn(t)
	listenOn(t, used)
	file := socketIn(t)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	free := socketIn(t)
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"socket in use":      {[]string{"run", "--net", "null", "--socket-path", used}, "in use by another process: stop it, or choose another path"},
		"socket is a file":   {[]string{"run", "--net", "null", "--socket-path", file}, "not a socket: remove it"},
		"no directory":       {[]string{"run", "--net", "null", "--socket-path", free + "/x"}, "no such file or directory"},
		"control in use":     {[]string{"run", "--net", "null", "--socket-path", free, "--control", used}, "--control none does without"},
		"metrics in use":     {[]string{"run", "--net", "null", "--socket-path", free, "--metrics", busy.Addr().String()}, "--metrics: listen tcp"},
		"descriptor missing": {[]string{"run", "--net", "null", "--fd", "77"}, "descriptor 77 is not open: whoever starts vhostd must pass it on"},
		"descriptor no sock": {[]string{"run", "--net", "null", "--fd", "1"}, "descriptor 1 is not a socket"},
		"too many queues":    {[]string{"run", "--net", "user", "--queues", "99", "--socket-path", free}, "99 queue pairs"},
		"tiny MTU":           {[]string{"run", "--net", "null", "--mtu", "20", "--socket-path", free}, "MTU 20, must be 68 to 65535"},
		"bench of nobody":    {[]string{"bench", "--socket-path", free}, "no back-end listens on " + free},
		"stats of nobody":    {[]string{"stats", "--socket-path", free}, "is vhostd running"},
		"man to nowhere":     {[]string{"man", "--dir", free}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			got := command(t, c.args...)
			if got.code != exitFailure || !strings.Contains(got.stderr, c.want) {
				t.Errorf("code %d, stderr %q; want code %d and %q", got.code, got.stderr, exitFailure, c.want)
			}
			for _, path := range []string{free, free + controlSuffix} {
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left behind (%v)", path, err)
				}
			}
		})
	}
}

// TestPrintCapabilities: the vhost-user "backend program conventions" have other options ignored, and the program found as
// vhost-user-net and started without a command.
func TestPrintCapabilities(t *testing.T) {
	const want = "{\n  \"type\": \"net\"\n}\n"
	link := filepath.Join(t.TempDir(), "vhost-user-net")
	if err := os.Symlink(binary, link); err != nil {
		t.Fatal(err)
	}
	for name, cmd := range map[string]*exec.Cmd{
		"run":            exec.Command(binary, "run", "--print-capabilities"),
		"others ignored": exec.Command(binary, "run", "--fd", "77", "--socket-path", "/none", "--net", "sing", "--print-capabilities"),
		"vhost-user-net": exec.Command(link, "--print-capabilities"),
	} {
		if got := finish(t, cmd); got != (result{0, want, ""}) {
			t.Errorf("%s: %+v, want %q", name, got, want)
		}
	}
}

func TestVersionAndHelp(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"version", "vhostd "},
		{"version --json", `"go": "go1`},
		{"--version", "vhostd version"},
		{"", "vhostd doctor"},
		{"run --help", "--net tap"},
		{"completion bash", "__vhostd"},
	} {
		if got := command(t, strings.Fields(c.args)...); got.code != 0 || !strings.Contains(got.stdout, c.want) || got.stderr != "" {
			t.Errorf("vhostd %s: code %d, stderr %q, want %q in:\n%s", c.args, got.code, got.stderr, c.want, got.stdout)
		}
	}
}

func TestMan(t *testing.T) {
	dir := t.TempDir()
	if got := command(t, "man", "--dir", dir); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	for page, want := range map[string]string{"vhostd.1": ".TH", "vhostd-run.1": "socket-path", "vhostd-stats.1": "watch", "vhostd-doctor.1": "json", "vhostd-bench.1": "processor",
		"vhostd-serve.1": "SIGHUP", "vhostd-reload.1": "dry-run", "vhostd-check.1": "config"} {
		if b, err := os.ReadFile(filepath.Join(dir, page)); err != nil || !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s: %v, want %q in it", page, err, want)
		}
	}
}
