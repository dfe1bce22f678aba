package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestSignalsEndCleanly: exit code 0, with and without a guest that is busy, and the sockets are gone.
func TestSignalsEndCleanly(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/guest=%v", sig, busy), func(t *testing.T) {
				path := socketIn(t)
				p := start(t, "--socket-path", path, "--net", "null,generate=on")
				if busy {
					g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
					if _, _, err := g.Recv(0, patience); err != nil {
						t.Fatal(err)
					}
				}
				if code := p.end(sig); code != exitOK {
					t.Errorf("exit code %d", code)
				}
				if exists(path) || exists(path+controlSuffix) {
					t.Error("a socket is left behind")
				}
			})
		}
	}
}

// TestIgnoredHangup: a vhostd under nohup outlives its terminal.
func TestIgnoredHangup(t *testing.T) {
	path := socketIn(t)
	p := launch(t, exec.Command("nohup", binary, "run", "--net", "null", "--socket-path", path))
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if got := command(t, "stats", "--socket-path", path); got.code != 0 {
		t.Errorf("vhostd does not answer after SIGHUP: %+v", got)
	}
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestLogReaderGoesAway: vhostd goes on when nobody reads its log any more.
func TestLogReaderGoesAway(t *testing.T) {
	path := socketIn(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--net", "null", "--socket-path", path)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	defer cmd.Wait()         //nolint:errcheck // killed
	defer cmd.Process.Kill() //nolint:errcheck // ended, then
	for lines := bufio.NewScanner(r); lines.Scan() && !strings.Contains(lines.Text(), "ready"); {
	}
	r.Close()
	for range 3 { // each is a line of the log
		g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
		g.Close()
	}
	if got := command(t, "stats", "--socket-path", path); got.code != 0 {
		t.Errorf("vhostd does not answer: %+v", got)
	}
}

func TestStaleSocketsAreReplaced(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null")
	p.end(syscall.SIGKILL)
	if !exists(path) || !exists(path+controlSuffix) {
		t.Fatal("SIGKILL left no sockets: this test shows nothing")
	}
	if code := start(t, "--socket-path", path, "--net", "null").end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

func TestSocketModeAndGroup(t *testing.T) {
	gids, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	gid := append(gids, os.Getgid())[0]
	if os.Geteuid() == 0 {
		gid = 12345
	}
	for _, c := range []struct {
		args []string
		mode os.FileMode
		gid  int
	}{
		{nil, 0o600, os.Getegid()},
		{[]string{"--socket-mode", "0666"}, 0o666, os.Getegid()},
		{[]string{"--socket-group", fmt.Sprint(gid)}, 0o660, gid},
		{[]string{"--socket-group", fmt.Sprint(gid), "--socket-mode", "0620"}, 0o620, gid},
	} {
		path := socketIn(t)
		p := start(t, append([]string{"--socket-path", path, "--net", "null"}, c.args...)...)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := int(info.Sys().(*syscall.Stat_t).Gid); info.Mode().Perm() != c.mode || got != c.gid {
			t.Errorf("%v: mode %v, group %d; want %v, %d", c.args, info.Mode().Perm(), got, c.mode, c.gid)
		}
		if info, err := os.Stat(path + controlSuffix); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v: the control socket has mode %v, want 0600 (%v)", c.args, info.Mode(), err)
		}
		p.end(syscall.SIGTERM)
	}
}

// TestSocketGroupByName takes a group that everybody is in.
func TestSocketGroupByName(t *testing.T) {
	g, err := user.LookupGroupId(fmt.Sprint(os.Getegid()))
	if err != nil {
		require.Skip(t, "group", "that of this process has no name: %v", err)
	}
	if gid, err := confine.LookupGroup(g.Name); err != nil || gid != os.Getegid() {
		t.Errorf("group %s is %d (%v), want %d", g.Name, gid, err, os.Getegid())
	}
}

func TestControlPath(t *testing.T) {
	path := socketIn(t)
	other := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null", "--control", other)
	if exists(path+controlSuffix) || !exists(other) {
		t.Error("--control did not move the control socket")
	}
	p.end(syscall.SIGTERM)
	p = start(t, "--socket-path", path, "--net", "null", "--control", controlNone)
	if exists(path+controlSuffix) || exists(controlNone) {
		t.Error("--control none made a control socket")
	}
	p.end(syscall.SIGTERM)
}

// TestNotify is the service manager's side of sd_notify.
func TestNotify(t *testing.T) {
	manager := socketIn(t)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: manager, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	path := socketIn(t)
	cmd := exec.Command(binary, "run", "--net", "null", "--socket-path", path)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+manager)
	p := launch(t, cmd)
	next := func(want string) {
		t.Helper()
		b := make([]byte, 256)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		n, err := conn.Read(b)
		if err != nil || !strings.HasPrefix(string(b[:n]), want) {
			t.Errorf("got %q (%v), want %q", b[:max(n, 0)], err, want)
		}
	}
	next("READY=1")
	next("STATUS=Waiting for a VMM on " + path)
	fe := dialFrontEnd(t, path)
	next("STATUS=Serving a VMM since ")
	fe.Close()
	next("STATUS=Waiting")
	p.end(syscall.SIGTERM)
	next("STOPPING=1")
}

// TestOffers: what the options say is what a front-end is offered.
func TestOffers(t *testing.T) {
	path := socketIn(t)
	start(t, "--socket-path", path, "--net", "null", "--queues", "2", "--mac", "52:54:00:12:34:56", "--mtu", "9000",
		"--disable-features", "mrg_rxbuf,VIRTIO_RING_F_EVENT_IDX")
	g := vhosttest.New(t, nil, vhosttest.Options{Path: path})
	g.Dial()
	g.Negotiate()
	if want := virtio.FNetMAC | virtio.FNetMTU | virtio.FNetMQ; !g.Offered.Has(want) {
		t.Errorf("offered %v, want %v", g.Offered, want)
	}
	if not := g.Offered & (virtio.FNetMrgRxbuf | virtio.FEventIdx); not != 0 {
		t.Errorf("offered %v all the same", not)
	}
	if n, err := g.FE.GetQueueNum(); err != nil || n != 2 {
		t.Errorf("%d queue pairs (%v), want 2", n, err)
	}
	b, err := g.FE.GetConfig(0, 12)
	if err != nil {
		t.Fatal(err)
	}
	want := []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0, 0x28, 0x23}
	if string(b) != string(want) {
		t.Errorf("configuration space % x, want % x", b, want)
	}
}

// TestLogJSON: with --log-format json each line of the log is an object, and --log-level leaves out what is below it.
func TestLogJSON(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null", "--log-format", "json")
	p.end(syscall.SIGTERM)
	for line := range strings.Lines(p.stderr.String()) {
		var entry struct {
			Level, Msg string
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level == "" || entry.Msg == "" {
			t.Errorf("%q: %v", line, err)
		}
	}
	cmd := exec.Command(binary, "run", "--net", "null", "--socket-path", path, "--log-level", "error")
	var quiet buffer
	cmd.Stderr = &quiet
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the control socket is there", func() bool { return exists(path + controlSuffix) })
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil || quiet.String() != "" {
		t.Errorf("%v, stderr %q", err, quiet.String())
	}
}

// TestSecondSignalEndsAtOnce is its own vhostd, one that hangs at its end.
func TestSecondSignalEndsAtOnce(t *testing.T) {
	if os.Getenv("VHOSTD_TEST_STUCK") != "" {
		ctx, cancel := untilSignal(newLog("text", slog.LevelInfo, os.Stderr), syscall.SIGTERM)
		defer cancel()
		fmt.Fprintln(os.Stderr, "ready")
		<-ctx.Done()
		<-context.Background().Done() // and never ends
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "VHOSTD_TEST_STUCK=1")
	p := launch(t, cmd)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.waitLog("ending")
	if code := p.end(syscall.SIGTERM); code != exitFailure {
		t.Errorf("exit code %d, want %d", code, exitFailure)
	}
}

// TestSecondFrontEndIsRefused: the first one does not notice.
func TestSecondFrontEndIsRefused(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null")
	first := dialFrontEnd(t, path)
	askFeatures(t, first)
	if _, err := dialFrontEnd(t, path).GetFeatures(); err == nil {
		t.Error("a second front-end is served")
	}
	p.waitLog("refused a second front-end")
	askFeatures(t, first)
}
