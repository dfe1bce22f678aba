package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
)

// nobody is a user who owns nothing.
const nobody = 65534

// as has a command run as a user, who has one group and no capabilities.
func as(uid int, cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: []uint32{uint32(uid)}}}
	return cmd
}

// forEverybody lets all users start the program under test, and returns a socket path in a directory that is uid's.
func forEverybody(t *testing.T, uid int) (path string) {
	t.Helper()
	require.Root(t, "root")
	path = socketIn(t)
	for _, err := range []error{os.Chmod(filepath.Dir(binary), 0o755), os.Chown(filepath.Dir(path), uid, uid), os.Chmod(filepath.Dir(path), 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// TestRootless: an ordinary user's vhostd serves a guest with the devices that need no privilege, and a tap that was made for him.
func TestRootless(t *testing.T) {
	needConfinement(t)
	lab := netdevtest.NewLab(t, "netns", 1500, 0)
	if err := lab.Try(fmt.Sprintf("ip -n %s tuntap add vt0 mode tap user %d vnet_hdr", lab.Here, nobody)); err != nil {
		require.Skip(t, "tap", "%v", err)
	}
	lab.Run("ip -n " + lab.Here + " link set vt0 up")
	all := kindCases(t, lab)
	for _, name := range []string{"null", "user", "dgram", "tap"} {
		c := all[name]
		t.Run(name, func(t *testing.T) {
			path := forEverybody(t, nobody)
			cmd := as(nobody, exec.Command(c.args[0], append(c.args[1:], "--socket-path", path)...))
			if name == "tap" { // ip netns exec wants root: it is told to become the user behind it
				setpriv := require.Tool(t, "root", "setpriv")
				ids := fmt.Sprint(nobody)
				cmd = exec.Command("ip", "netns", "exec", lab.Here, setpriv, "--reuid", ids, "--regid", ids, "--clear-groups", "--bounding-set", "-all",
					binary, "run", "--net", "tap:vt0", "--socket-path", path)
				c.traffic = exchange(lab.For(t).Wire(lab.Here, "vt0"))
			}
			p := launch(t, cmd)
			c.traffic(t, vhosttest.Start(t, nil, vhosttest.Options{Path: path}))
			for _, field := range []string{"CapPrm", "CapEff", "CapAmb"} {
				for _, got := range taskStatus(t, cmd.Process.Pid, field) {
					if got != "0000000000000000" {
						t.Errorf("%s is %s", field, got)
					}
				}
			}
			if code := p.end(syscall.SIGTERM); code != exitOK || exists(path) {
				t.Errorf("exit code %d, the socket is left %v", code, exists(path))
			}
		})
	}
}

// TestUserOption: root's vhostd opens what only root can, and then is somebody else, to whom its sockets belong.
func TestUserOption(t *testing.T) {
	needConfinement(t)
	lab := netdevtest.NewLab(t, "netns", 1500, 0)
	for name, own := range map[string]bool{"directory of the user's": true, "directory of root's": false} {
		t.Run(name, func(t *testing.T) {
			uid := 0
			if own {
				uid = nobody
			}
			path := forEverybody(t, uid)
			cmd := exec.Command("ip", "netns", "exec", lab.Here, binary, "run", "--net", "tap:vu0", "--user", fmt.Sprintf("%d:12345", nobody), "--socket-path", path)
			p := launch(t, cmd)
			exchange(lab.For(t).Wire(lab.Here, "vu0"))(t, vhosttest.Start(t, nil, vhosttest.Options{Path: path}))
			checkConfined(t, cmd.Process.Pid, 0)
			for field, want := range map[string]string{"Uid": "65534\t65534\t65534\t65534", "Gid": "12345\t12345\t12345\t12345", "Groups": "12345"} {
				for _, got := range taskStatus(t, cmd.Process.Pid, field) {
					if got != want {
						t.Errorf("%s is %q on a thread, want %q", field, got, want)
					}
				}
			}
			for _, socket := range []string{path, path + controlSuffix} {
				info, err := os.Stat(socket)
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Sys().(*syscall.Stat_t).Uid; got != nobody || info.Mode().Perm() != 0o600 {
					t.Errorf("%s belongs to user %d, mode %v", socket, got, info.Mode())
				}
			}
			if code := p.end(syscall.SIGTERM); code != exitOK || exists(path) == own {
				t.Errorf("exit code %d, the socket is left %v", code, exists(path))
			}
			if !own && !strings.Contains(p.stderr.String(), "the next vhostd replaces it") {
				t.Error("nothing is said about the socket that stays")
			}
		})
	}
}

// TestServeAsUser: root's vhostd serve becomes somebody else, who can ask it and have it read its file again.
func TestServeAsUser(t *testing.T) {
	needConfinement(t)
	m := &many{dir: filepath.Dir(forEverybody(t, nobody))}
	m.write(t, fmt.Sprintf("[port.a]\n[sandbox]\nuser = \"%d\"\n", nobody))
	if err := os.Chmod(m.file(), 0o644); err != nil {
		t.Fatal(err)
	}
	m.process = launch(t, exec.Command(binary, "serve", "--config", m.file()))
	for _, ask := range []string{"stats", "reload"} {
		if got := finish(t, as(nobody, exec.Command(binary, ask, "--config", m.file()))); got.code != exitOK {
			t.Errorf("%s: %+v", ask, got)
		}
	}
	if code := m.end(syscall.SIGTERM); code != exitOK || exists(m.socket("a")) || exists(filepath.Join(m.dir, "ctl")) {
		t.Errorf("exit code %d, socket left %v, control socket left %v", code, exists(m.socket("a")), exists(filepath.Join(m.dir, "ctl")))
	}
}

// TestSocketOwner: the socket belongs to whom it is to belong to.
func TestSocketOwner(t *testing.T) {
	require.Root(t, "root")
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null", "--socket-owner", fmt.Sprint(nobody), "--socket-group", "12345")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != nobody || st.Gid != 12345 || info.Mode().Perm() != 0o660 {
		t.Errorf("owner %d, group %d, mode %v", st.Uid, st.Gid, info.Mode())
	}
	if code := p.end(syscall.SIGTERM); code != exitOK || exists(path) {
		t.Errorf("exit code %d, the socket is left %v", code, exists(path))
	}
}

// TestAllowUID: who is not among those who may connect is not served, although he can open the socket, and does not hold up who is.
func TestAllowUID(t *testing.T) {
	for name, c := range map[string]struct {
		allow []string
		in    []int // of 0, 1001 and 1002
	}{
		"by user":            {[]string{"--allow-uid", "1001"}, []int{1001}},
		"by users":           {[]string{"--allow-uid", "root,1002"}, []int{0, 1002}},
		"by group":           {[]string{"--allow-gid", "1002"}, []int{1002}},
		"by user and group":  {[]string{"--allow-uid", "1001", "--allow-gid", "1002"}, []int{1001, 1002}},
		"everybody, no list": {nil, []int{0, 1001, 1002}},
	} {
		t.Run(name, func(t *testing.T) {
			path := forEverybody(t, 0)
			p := start(t, append([]string{"--socket-path", path, "--net", "null", "--socket-mode", "0666"}, c.allow...)...)
			for _, uid := range []int{0, 1001, 1002} {
				got := finish(t, as(uid, exec.Command(binary, "bench", "--socket-path", path, "--frame", "64", "--duration", "10ms")))
				if served := got.code == exitOK; served != slices.Contains(c.in, uid) {
					t.Errorf("user %d: code %d, %s", uid, got.code, got.stderr)
				}
			}
			if refused := strings.Contains(p.stderr.String(), "refused a front-end"); refused != (len(c.in) < 3) {
				t.Errorf("a refusal is logged: %v", refused)
			}
			// Root may ask always; others cannot open the control socket, and are refused if it is opened to them.
			if got := command(t, "stats", "--socket-path", path); got.code != exitOK {
				t.Errorf("stats for root: %+v", got)
			}
			if err := os.Chmod(path+controlSuffix, 0o666); err != nil {
				t.Fatal(err)
			}
			got := finish(t, as(1001, exec.Command(binary, "stats", "--socket-path", path)))
			if served := got.code == exitOK; served != slices.Contains(c.in, 1001) {
				t.Errorf("stats for user 1001: %+v", got)
			}
		})
	}
}

// TestAllowUIDOfListener: in client mode it is who listens that has to be allowed.
func TestAllowUIDOfListener(t *testing.T) {
	path := socketIn(t)
	listenOn(t, path)
	got := command(t, "run", "--socket-path", path, "--net", "null", "--client", "--allow-uid", fmt.Sprint(os.Geteuid()+1))
	if got.code != exitFailure || !strings.Contains(got.stderr, "not among the users and groups that may connect") {
		t.Errorf("%+v", got)
	}
}

// TestNoSandbox: all rights stay, which the log says.
func TestNoSandbox(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null", "--no-sandbox")
	for _, got := range taskStatus(t, p.cmd.Process.Pid, "Seccomp") {
		if own, err := os.ReadFile("/proc/self/status"); err != nil || !strings.Contains(string(own), "\nSeccomp:\t"+got+"\n") {
			t.Errorf("Seccomp is %s, and for ourselves it is not (%v)", got, err)
		}
	}
	p.waitLog("not confined")
}

// TestSocketsUnderUmask: whatever the umask is, the sockets are nobody else's from the start.
func TestSocketsUnderUmask(t *testing.T) {
	path := socketIn(t)
	launch(t, exec.Command("sh", "-c", `umask 0; exec "$0" run --net null --socket-path "$1"`, binary, path))
	for _, socket := range []string{path, path + controlSuffix} {
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 || info.Mode().Type() != fs.ModeSocket {
			t.Errorf("%s: %v (%v), want a socket of mode 0600", socket, info.Mode(), err)
		}
	}
}
