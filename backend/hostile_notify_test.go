package backend_test

import (
	"errors"
	"math"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// What a front-end hands over to be signalled or polled may be anything. What is no eventfd is refused: somebody else can have whoever uses it wait.
func TestF18Descriptors(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	for name, open := range map[string]func(t *testing.T) (fd int){
		"regular file": func(t *testing.T) int {
			return must(unix.Open(filepath.Join(t.TempDir(), "file"), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600))
		},
		"full pipe": func(t *testing.T) int {
			r, w := pipe(t)
			_ = r
			unix.SetNonblock(w, true)
			for {
				if _, err := unix.Write(w, make([]byte, 4096)); err != nil {
					break
				}
			}
			unix.SetNonblock(w, false)
			return must(unix.FcntlInt(uintptr(w), unix.F_DUPFD_CLOEXEC, 0))
		},
		"empty pipe, blocking": func(t *testing.T) int {
			r, _ := pipe(t)
			return must(unix.FcntlInt(uintptr(r), unix.F_DUPFD_CLOEXEC, 0))
		},
		"pipe without a reader": func(t *testing.T) int {
			var p [2]int
			unix.Pipe2(p[:], unix.O_CLOEXEC)
			unix.Close(p[0])
			return p[1]
		},
		"pipe without a writer": func(t *testing.T) int {
			var p [2]int
			unix.Pipe2(p[:], unix.O_CLOEXEC)
			unix.Close(p[1])
			return p[0]
		},
		"socket, hung up": func(t *testing.T) int {
			p, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			unix.Close(p[1])
			return p[0]
		},
		"socket, not connected": func(t *testing.T) int {
			return must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
		},
		"directory": func(t *testing.T) int { return must(unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_CLOEXEC, 0)) },
		"path":      func(t *testing.T) int { return must(unix.Open(t.TempDir(), unix.O_PATH|unix.O_CLOEXEC, 0)) },
		"epoll":     func(*testing.T) int { return must(unix.EpollCreate1(unix.EPOLL_CLOEXEC)) },
		"full eventfd": func(*testing.T) int {
			fd := must(unix.Eventfd(0, unix.EFD_CLOEXEC))
			unix.Write(fd, u64(math.MaxUint64-1))
			return fd
		},
		"device that is always ready": func(*testing.T) int { return must(unix.Open("/dev/zero", unix.O_RDWR|unix.O_CLOEXEC, 0)) },
		"memory file":                 func(*testing.T) int { return must(unix.MemfdCreate("notification", unix.MFD_CLOEXEC)) },
	} {
		t.Run(name, func(t *testing.T) {
			e := attack(t, vhosttest.Options{Without: virtio.FEventIdx})
			for i := range uint32(2) {
				for _, set := range []func(uint32, int) error{e.FE.SetVringKick, e.FE.SetVringCall, e.FE.SetVringErr} {
					fd := open(t)
					var nack *vhostuser.NACKError
					if err := set(i, fd); err != nil && !errors.As(err, &nack) || (err == nil) != (name == "full eventfd") {
						t.Fatal(err)
					}
					unix.Close(fd)
				}
			}
			// The guest looks for itself; the ring is alive if it has a kick that works, or none.
			for i, q := range e.Queues {
				if err := e.FE.SetVringKick(uint32(i), q.Kick.FD()); err != nil {
					t.Fatal(err)
				}
			}
			q := e.Transmitq(0)
			q.Driver.EnableCall() // it asks for calls all the same
			for i := range 10 {
				if _, err := e.Transmitq(0).Add(virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
					t.Fatal(err)
				}
				e.Transmitq(0).Flush()
			}
			vhosttest.Eventually(t, "ten frames", func() bool { q.Reap(); return q.Driver.Out() == 0 })
			if errs := e.be.Stats().Queues[1].NotifyErrors; errs != 0 {
				t.Errorf("%d errors of a descriptor that was refused, or is full", errs)
			}
			n.goesOn(t)
			for _, q := range e.Queues {
				if err := e.FE.SetVringCall(uint32(q.Index), q.Call.FD()); err != nil {
					t.Fatal(err)
				}
			}
			e.dev.wires[0].got()
			e.works(t)
		})
	}
}

func must(fd int, err error) int {
	if err != nil {
		panic(err)
	}
	return fd
}

// pipe makes a blocking pipe, closed at the end of the test.
func pipe(t *testing.T) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}
