package xdp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys/xsk"
	"github.com/vhostd/vhostd/netdev"
)

// Check finds out what this host can do for AF_XDP. It attaches nothing.
func Check() []netdev.Fact {
	return []netdev.Fact{checkSocket(), checkProgram()}
}

// checkSocket makes a socket over a little memory, with what is used of the kernel where it has it.
func checkSocket() netdev.Fact {
	f := netdev.Fact{What: "AF_XDP sockets"}
	try := func(unaligned bool, meta int) error {
		arena, err := shm.NewArena(16 * xsk.MaxChunk)
		if err != nil {
			return err
		}
		defer arena.Close()
		s, err := xsk.New(xsk.Config{
			Memory: arena.Bytes(), Chunk: xsk.MaxChunk, Unaligned: unaligned, Metadata: meta, Fill: 16, Rx: 16, Tx: 16, Done: 16,
		})
		if err != nil {
			return err
		}
		return s.Close()
	}
	if err := try(false, 0); err != nil {
		f.Detail = err.Error()
		f.Fix = "use a kernel with CONFIG_XDP_SOCKETS"
		if errors.Is(err, unix.EPERM) {
			f.Fix = "give vhostd CAP_NET_RAW: run as root, or set AmbientCapabilities= in the systemd unit"
		}
		return f
	}
	f.OK, f.Detail = true, "open"
	if err := try(true, 0); err != nil {
		f.Detail += "; guest memory cannot be registered (" + err.Error() + ")"
	}
	if err := try(true, metaSize); err != nil {
		f.Detail += "; no checksum can be left to the kernel, which Linux 6.8 and newer take"
	}
	return f
}

// checkProgram loads the program and its maps.
func checkProgram() netdev.Fact {
	f := netdev.Fact{What: "XDP programs"}
	p := &program{}
	err := p.load(AllQueues, 1, 1518)
	frags := err == nil && p.frags
	_ = p.close()
	if err != nil {
		f.Detail = err.Error()
		f.Fix = "give vhostd CAP_NET_ADMIN and CAP_BPF (CAP_SYS_ADMIN before Linux 5.8): run as root, or set AmbientCapabilities= in the systemd unit"
		return f
	}
	f.OK, f.Detail = true, "load"
	if !frags {
		f.Detail += fmt.Sprintf("; frames longer than %d bytes need Linux 5.18 or newer", xsk.MaxChunk-xsk.Room)
	}
	return f
}
