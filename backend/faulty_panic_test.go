package backend_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const lostItsMind = "bug: the device has lost its mind"

// panicking are devices with a bug, and what the process says at its end. use does what brings it out.
var panicking = map[string]struct {
	says string
	sick func(f *faulty)
	use  func(s *sick, f *faulty) error
}{
	"Send": {lostItsMind, func(f *faulty) { f.send = func([]*zerocopy.Buffer) int { panic(lostItsMind) } }, sendOne},
	"Recv": {lostItsMind, func(f *faulty) {
		f.recv = func(*zerocopy.Posted, int) (int, bool, error) { panic(lostItsMind) }
	}, sendOne},
	"Reap": {lostItsMind, func(f *faulty) { f.reap = func() { panic(lostItsMind) } }, sendOne},
	"Reap, on the control side": {lostItsMind, func(f *faulty) {}, func(s *sick, f *faulty) error {
		if err := sendOne(s, f); err != nil {
			return err
		}
		if err := s.Transmitq(0).Settle(); err != nil {
			return err
		}
		change(f, &f.reap, func() { panic(lostItsMind) })
		_, err := s.FE.GetVringBase(1)
		return err
	}},
	"a nil pointer": {"nil pointer dereference", func(f *faulty) {
		f.send = func([]*zerocopy.Buffer) int { var none *faulty; return len(none.held) }
	}, sendOne},
	// What was mapped once is not taken for a guest's memory that has been truncated.
	"memory that is gone": {"bug: access to address", func(f *faulty) {
		f.send = func([]*zerocopy.Buffer) int {
			mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err == nil {
				err = unix.Munmap(mem)
			}
			if err != nil {
				panic(err)
			}
			return int(mem[5000])
		}
	}, sendOne},
}

func sendOne(s *sick, _ *faulty) error {
	return s.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 100), nil)
}

// sickProcess names the device for the process that is to end.
const sickProcess = "VHOSTD_TEST_PANIC"

// TestFaultyPanics: a device with a bug ends the process at once, with a message that says so, wherever it strikes: it is laid to no guest, and nobody goes on
// with a state that cannot be.
func TestFaultyPanics(t *testing.T) {
	if name := os.Getenv(sickProcess); name != "" {
		f := newFaulty(t)
		c := panicking[name]
		c.sick(f)
		err := c.use(startSick(t, f), f)
		time.Sleep(vhosttest.Patience)
		t.Fatalf("the process goes on (%v)", err)
	}
	for name, c := range panicking {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*vhosttest.Patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestFaultyPanics$")
			cmd.Env = append(os.Environ(), sickProcess+"="+name)
			var said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said, &said
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 2 {
				t.Errorf("the process ended with %v, want status 2", err)
			}
			if said := said.String(); !strings.Contains(said, "panic: ") || !strings.Contains(said, c.says) || strings.Contains(said, "goes on") {
				t.Errorf("it said\n%s", said)
			}
		})
	}
}
