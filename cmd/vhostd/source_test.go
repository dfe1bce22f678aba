package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// askFeatures is the smallest conversation of a front-end.
func askFeatures(t *testing.T, fe *vhostuser.FrontEnd) {
	t.Helper()
	f, err := fe.GetFeatures()
	if err != nil {
		t.Fatal(err)
	}
	if !virtio.Features(f).Has(virtio.FVersion1 | virtio.FNetMrgRxbuf) {
		t.Errorf("features %v", virtio.Features(f))
	}
}

// TestInheritedConnection: --fd with a connected socket serves that one front-end, and ends with it.
func TestInheritedConnection(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	cmd := exec.Command(binary, "run", "--net", "null", "--fd", "3")
	cmd.ExtraFiles = []*os.File{theirs}
	p := launch(t, cmd)
	theirs.Close()
	conn, err := vhostuser.NewConnFD(pair[0], vhostuser.ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fe := vhostuser.NewFrontEnd(conn)
	askFeatures(t, fe)
	if out := p.stdout.String(); out != "" {
		t.Errorf("whoever passed a descriptor is told how to start QEMU: %s", out)
	}
	fe.Close()
	if code := p.wait(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// dialFrontEnd connects to a path.
func dialFrontEnd(t *testing.T, path string) *vhostuser.FrontEnd {
	t.Helper()
	fe, err := vhostuser.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fe.Close() })
	return fe
}

// TestInheritedListener: --fd with a listening socket serves one front-end after the other, and leaves the path alone.
func TestInheritedListener(t *testing.T) {
	path := socketIn(t)
	l := listenOn(t, path)
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--net", "null", "--fd", "3")
	cmd.ExtraFiles = []*os.File{f}
	p := launch(t, cmd)
	f.Close()
	l.Close()
	for range 2 {
		fe := dialFrontEnd(t, path)
		askFeatures(t, fe)
		fe.Close()
	}
	if got := command(t, "stats", "--socket-path", path); got.code != 0 {
		t.Errorf("no control socket beside the inherited one: %+v", got)
	}
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if !exists(path) {
		t.Error("vhostd removed a path that is not its own")
	}
}

// TestSocketActivation starts vhostd as systemd does: the socket as descriptor 3, and the variables that speak of it. The shell is
// there to know the process id before.
func TestSocketActivation(t *testing.T) {
	path := socketIn(t)
	l := listenOn(t, path)
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vm exec "$0" run --net null`, binary)
	cmd.ExtraFiles = []*os.File{f}
	p := launch(t, cmd)
	f.Close()
	l.Close()
	askFeatures(t, dialFrontEnd(t, path))
	if !strings.Contains(p.stdout.String(), "path="+path) {
		t.Errorf("the hint does not name %s:\n%s", path, p.stdout.String())
	}
	if code := p.end(syscall.SIGTERM); code != exitOK || !exists(path) {
		t.Errorf("exit code %d, the path is there: %v", code, exists(path))
	}
}

func TestSocketActivationWithoutSocket(t *testing.T) {
	cmd := exec.Command("sh", "-c", `LISTEN_PID=1 LISTEN_FDS=1 exec "$0" run --net null`, binary)
	if got := finish(t, cmd); got.code != exitFailure || !strings.Contains(got.stderr, "passed 0 sockets") {
		t.Errorf("%+v", got)
	}
}

// TestClient: the front-end listens, and vhostd comes back to it.
func TestClient(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--client", "--net", "null")
	p.waitLog("waiting for the VMM to listen")
	l := listenOn(t, path)
	for range 2 {
		if err := l.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		fe := vhostuser.NewFrontEnd(vhostuser.NewConn(c, vhostuser.ConnOptions{}))
		askFeatures(t, fe)
		fe.Close()
	}
	if !strings.Contains(p.stdout.String(), "path="+path+",server=on") {
		t.Errorf("the hint is not for a QEMU that listens:\n%s", p.stdout.String())
	}
	if code := p.end(syscall.SIGTERM); code != exitOK || !exists(path) {
		t.Errorf("exit code %d, the VMM's socket is there: %v", code, exists(path))
	}
}
