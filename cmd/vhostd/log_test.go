package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// TestLogThatCannotBeWritten: whatever becomes of what vhostd logs, the guest's network goes on, questions are answered, and the end comes when it is asked
// for. What is logged is hundreds of lines from the session's goroutine, which is the one that has queues locked.
func TestLogThatCannotBeWritten(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) *os.File{
		"nobody reads": func(t *testing.T) *os.File {
			r, w := pipe(t)
			t.Cleanup(func() { r.Close() })
			fd := int(w.Fd())
			must(t, unix.SetNonblock(fd, true))
			for junk := make([]byte, 4096); ; {
				if _, err := unix.Write(fd, junk); err != nil {
					break // full
				}
			}
			must(t, unix.SetNonblock(fd, false))
			return w
		},
		"reader gone": func(t *testing.T) *os.File {
			r, w := pipe(t)
			must(t, r.Close())
			return w
		},
		"disk full": func(t *testing.T) *os.File {
			require.Root(t, "root")
			dir := t.TempDir()
			if err := unix.Mount("vhostd-test", dir, "tmpfs", 0, "size=4k"); err != nil {
				require.Skip(t, "root", "tmpfs: %v", err)
			}
			t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
			must(t, os.WriteFile(filepath.Join(dir, "log"), make([]byte, 4096), 0o600))
			f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			if _, err := f.WriteString("x"); err == nil {
				t.Fatal("the disk is not full")
			}
			return f
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := socketIn(t)
			stderr := open(t)
			cmd := exec.Command(binary, "run", "--socket-path", path, "--net", "null,echo=on", "--log-level", "debug")
			cmd.Stderr = stderr
			must(t, cmd.Start())
			stderr.Close()
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			t.Cleanup(func() { _ = cmd.Process.Kill() })
			eventually(t, "the control socket", func() bool { return exists(path + controlSuffix) }) // the other one listens by then
			nagging(t, path)
			must(t, cmd.Process.Signal(syscall.SIGTERM))
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("vhostd ended with %v", err)
				}
			case <-time.After(patience):
				t.Error("vhostd does not end")
			}
		})
	}
}

// nagging is a guest with a front-end that has hundreds of requests refused, and whose frames come back all the same.
func nagging(t *testing.T, path string) {
	t.Helper()
	g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
	for i := range 300 {
		if err := g.FE.SetVringNum(0, 3); err == nil { // it runs, and 3 is no size
			t.Fatal("a bad request was not refused")
		}
		if err := g.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 500), nil); err != nil {
			t.Fatal(err)
		}
		_, frame, err := g.Recv(0, patience)
		must(t, err)
		if seq, err := vhosttest.CheckFrame(frame); err != nil || seq != uint64(i) {
			t.Fatalf("frame %d came back as %d: %v", i, seq, err)
		}
		if i%100 == 0 {
			statsOf(t, path)
			g.Reconnect()
		}
	}
	if r := statsOf(t, path); r.FrontEndErrors < 300 {
		t.Errorf("%d front-end errors", r.FrontEndErrors)
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	return r, w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
