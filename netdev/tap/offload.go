package tap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/offload"
)

// tunFlags pairs offloads with the flags of TUNSETOFFLOAD, in the order in which to do without them: kernels before 6.2 know no USO.
var tunFlags = []struct {
	set  offload.Set
	flag uint
}{
	{offload.USO4 | offload.USO6, unix.TUN_F_USO4 | unix.TUN_F_USO6}, // the kernel wants both or none
	{offload.UFO, unix.TUN_F_UFO},
	{offload.ECN, unix.TUN_F_TSO_ECN},
	{offload.TSO6, unix.TUN_F_TSO6},
	{offload.TSO4, unix.TUN_F_TSO4},
	{offload.Csum, unix.TUN_F_CSUM},
}

// flagsFor returns the flags for what of s the kernel can deliver by itself, and what that is. Everything needs Csum; ECN needs a TSO.
func flagsFor(s offload.Set) (flags uint, covered offload.Set) {
	if !s.Has(offload.Csum) {
		return 0, 0
	}
	if s&(offload.TSO4|offload.TSO6) == 0 {
		s &^= offload.ECN
	}
	for _, f := range tunFlags {
		if s.Has(f.set) {
			flags |= f.flag
			covered |= f.set
		}
	}
	return flags, covered
}

// setOffload tells the kernel that the guest takes want, or as much of it as the kernel knows, and returns that.
func (d *Device) setOffload(want offload.Set) (offload.Set, error) {
	fd := d.queues[0].fd
	for i := 0; ; i++ {
		flags, covered := flagsFor(want)
		err := sys.TunSetOffload(fd, flags)
		if err == nil {
			return covered, nil
		}
		if !errors.Is(err, unix.EINVAL) || i == len(tunFlags) {
			return 0, fmt.Errorf("%s: TUNSETOFFLOAD %#x: %w", d, flags, err)
		}
		want &^= tunFlags[i].set
	}
}

// probeOffloads finds out what the kernel can do, and leaves the tap delivering frames without any offload.
func (d *Device) probeOffloads() error {
	if d.queues[0].hdr == 0 {
		return nil // nothing in front of a frame could tell of an offload
	}
	known, err := d.setOffload(offload.All)
	if err != nil {
		return err
	}
	// From the guest the kernel takes all of these since 2.6.38, but USO only if it knows it.
	const always = offload.Csum | offload.TSO4 | offload.TSO6 | offload.ECN | offload.UFO
	d.toGuest, d.fromGuest = known, always|known
	_, err = d.setOffload(0)
	return err
}

// SetOffloads tells the kernel what the guest takes; it does the rest before frames reach the tap. The set is one for all queues.
func (d *Device) SetOffloads(accept offload.Set) error {
	for _, q := range d.queues {
		q.recv.accept = accept
	}
	if d.queues[0].hdr == 0 {
		return nil
	}
	_, err := d.setOffload(accept & d.toGuest)
	return err
}
