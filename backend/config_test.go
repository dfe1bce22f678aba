package backend_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

func TestRARP(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	if err := e.FE.SendRARP([6]byte{2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee}); err != nil {
		t.Fatal(err)
	}
	e.Barrier()
	want := slices.Concat(bytes.Repeat([]byte{0xff}, 6), []byte("\x02\xaa\xbb\xcc\xdd\xee\x80\x35"),
		[]byte("\x00\x01\x08\x00\x06\x04\x00\x03"),
		[]byte("\x02\xaa\xbb\xcc\xdd\xee"), make([]byte, 4), []byte("\x02\xaa\xbb\xcc\xdd\xee"), make([]byte, 4+18))
	sent := e.dev.wires[0].got()
	if len(sent) != 1 || !bytes.Equal(sent[0].data, want) {
		t.Errorf("sent %x, want %x", sent, want)
	}
}

func TestMTU(t *testing.T) {
	vhosttest.NoLeaks(t)
	d := newDevice(t, 1)
	d.mtu = 9000
	e := start(t, d, vhosttest.Options{})
	shown := func(want uint16) {
		t.Helper()
		b, err := e.FE.GetConfig(10, 2)
		if err != nil {
			t.Fatal(err)
		}
		if got := binary.LittleEndian.Uint16(b); got != want {
			t.Errorf("MTU %d in the configuration space, want %d", got, want)
		}
	}
	shown(9000)
	if err := e.FE.NetSetMTU(1400); err != nil {
		t.Fatal(err)
	}
	shown(1400)
	for _, mtu := range []uint16{0, 67, 9001, 65535} {
		refused(t, e, "MTU", e.FE.NetSetMTU(mtu))
	}
	shown(1400)
	for _, mtu := range []int{67, 9001} {
		if _, err := backend.New(backend.Options{Device: d, MTU: mtu}); err == nil {
			t.Errorf("an option MTU of %d is taken", mtu)
		}
	}
}

func TestConfigSpace(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := start(t, newDevice(t, 4), vhosttest.Options{}, func(o *backend.Options) {
		o.MAC, o.MTU, o.MaxPairs = [6]byte{2, 1, 2, 3, 4, 5}, 1500, 3
	})
	const offered = virtio.FNetMAC | virtio.FNetMTU | virtio.FNetMQ | virtio.FNetStatus
	if !e.Offered.Has(offered) {
		t.Errorf("features %v, want %v", e.Offered, offered)
	}
	want := []byte{2, 1, 2, 3, 4, 5, virtio.NetStatusLinkUp, 0, 3, 0, 1500 & 0xff, 1500 >> 8}
	got, err := e.FE.GetConfig(0, vhostuser.MaxConfigSize)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:12], want) || !bytes.Equal(got[12:], make([]byte, len(got)-12)) {
		t.Errorf("configuration space %x, want %x and zeroes", got, want)
	}
	if n, err := e.FE.GetQueueNum(); err != nil || n != 3 {
		t.Errorf("GET_QUEUE_NUM: %d, %v", n, err)
	}
	_, err = e.FE.GetConfig(0, 0)
	refused(t, e, "GET_CONFIG of size 0", err)
	for _, c := range []vhostuser.DeviceConfig{
		{Data: []byte{2, 1, 2, 3, 4, 5}},
		{Offset: 10, Data: []byte{0, 1}, Flags: vhostuser.ConfigMigration},
		{Data: want[:6], Flags: 2},
	} {
		refused(t, e, "SET_CONFIG", e.FE.SetConfig(c))
	}
	if err := e.FE.SetConfig(vhostuser.DeviceConfig{Data: want, Flags: vhostuser.ConfigMigration}); err != nil {
		t.Errorf("SET_CONFIG of what is there, after a migration: %v", err)
	}
}

func TestNothingOfferedThatWasDisabled(t *testing.T) {
	b := serve(t, newDevice(t, 1), func(o *backend.Options) { o.Disable = virtio.FInOrder | virtio.FNetMrgRxbuf | virtio.FProtocolFeatures })
	f, _ := b.Features()
	if f&(virtio.FInOrder|virtio.FNetMrgRxbuf|virtio.FNetMAC|virtio.FNetMTU|virtio.FNetMQ) != 0 {
		t.Errorf("features %v are offered", f)
	}
	if !f.Has(virtio.FProtocolFeatures) {
		t.Error("without protocol features there is no session: they cannot be disabled")
	}
}
