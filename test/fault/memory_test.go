//go:build linux

package fault

import (
	"fmt"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// TestMemoryGoesAway: F11 with a whole daemon over every network. While frames go both ways a front-end truncates the file of one of its four regions, in which
// parts of the rings lie and a fourth of all buffers: the daemon meets it in reading a ring, in writing one, in a copy, and in the system calls that are given the
// pages. It costs that guest its connection, and the next one has a network.
func TestMemoryGoesAway(t *testing.T) {
	require.NotShort(t)
	const here, there = "dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002", "dgram:local=127.0.0.1:7002,remote=127.0.0.1:7001"
	bridge := func() error {
		off := false
		return add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &off})
	}
	for name, c := range map[string]struct {
		net, peer string
		lay       func() error
	}{
		"null":                           {"null,echo=on", "", nothing},
		"tap, io_uring":                  {"tap:t0,bridge=br0", "tap:t1,bridge=br0", bridge},
		"tap, writev":                    {"tap:t0,bridge=br0,io-uring=off", "tap:t1,bridge=br0", bridge},
		"packet":                         {"packet:v0", "packet:v1", cable},
		"xdp":                            {"xdp:v0,mode=generic", "xdp:v1,mode=generic", cable},
		"xdp, registered":                {"xdp:v0,mode=generic,no-balloon=on", "xdp:v1,mode=generic", cable},
		"dgram, copied":                  {here + ",zerocopy=off", there, nothing},
		"dgram, by page":                 {here + ",zerocopy=on", there, nothing},
		"dgram, by page with the errors": {here + ",zerocopy=on,zerocopy-engine=msg_zerocopy", there, nothing},
		"dgram, registered":              {here + ",zerocopy=on,no-balloon=on", there, nothing},
	} {
		t.Run(name, func(t *testing.T) {
			r := networkRig(t, c.net, c.peer, c.lay, []failing{{call: unix.SYS_UNAME}})
			for i := range 4 {
				t.Run(fmt.Sprintf("region %d", i), func(t *testing.T) { r.cutOff(t, i) })
			}
		})
	}
}

// TestMemoryGoesAwayUser is the same for the user-mode network.
func TestMemoryGoesAwayUser(t *testing.T) {
	require.NotShort(t)
	echo := echoServer(t)
	r := newRig(t, netlab.Host, []int{unix.SYS_UNAME}, "user", "")
	for i := range 4 {
		r.shrinking(i, func() {})
		u := &userGuest{g: r.guest, udp: echo.udp, tcp: echo.tcp, from: uint16(20000 + 100*i)}
		vhosttest.Eventually(t, "the router's address", func() bool { r.alive(); return u.resolve(t) })
		u.works(r)
		r.goesOn()
	}
}

// cutOff has a guest come that truncates region i, and then one that does not.
func (r *rig) cutOff(t *testing.T, i int) {
	defer func(outer *testing.T) { r.t = outer }(r.t)
	r.t = t
	peer := r.peer
	r.shrinking(i, func() {
		if peer == r.guest {
			return // what is sent comes back
		}
		r.send(t, peer, 1, 100)
	})
	if peer == r.peer {
		r.drain(t, peer)
	}
	r.works()
	r.goesOn()
}

// shrinking is a guest that truncates region i while it sends, and f has something sent to it.
func (r *rig) shrinking(i int, f func()) {
	r.t.Helper()
	alone := r.peer == r.guest
	r.guest.Close()
	o := vhosttest.Options{Path: r.socket, Direct: true}
	for i := range 4 {
		o.Regions = append(o.Regions, vhosttest.RegionSpec{GPA: guestmem.GPA(i) << 32, Size: 4 << 20})
	}
	g := vhosttest.Start(r.t, nil, o)
	said := strings.Count(r.log.String(), truncated)
	q := g.Transmitq(0)
	n := uint64(q.Driver.Size() - 1)
	for seq := range n {
		if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(1<<59|seq, 600), nil); err != nil {
			r.t.Fatal(err)
		}
		if seq == n/2 {
			q.Flush()
		}
	}
	f()
	if err := g.Mem.Regions[i].Truncate(0); err != nil {
		r.t.Fatal(err)
	}
	// The other half is for a daemon that was done with the first by then. Its index may lie in what is gone, which the daemon meets in that case.
	flushInto(q)
	// Nothing of the guest's touches its memory from here on.
	vhosttest.Eventually(r.t, "the end of the session, and why", func() bool {
		q.Kick.Signal()
		f()
		r.alive()
		return strings.Count(r.log.String(), truncated) > said
	})
	if _, err := g.FE.GetFeatures(); err == nil {
		r.t.Error("the session goes on")
	}
	g.Close()
	r.guest = vhosttest.Start(r.t, nil, vhosttest.Options{Path: r.socket})
	if alone {
		r.peer = r.guest
	}
}

// flushInto makes what was added available, in memory that may be gone.
func flushInto(q *vhosttest.Queue) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { _ = recover() }()
	q.Flush()
}

// truncated is what the daemon says of it.
const truncated = "its file was truncated"
