package packet

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
)

func TestParseOptions(t *testing.T) {
	for s, want := range map[string]Options{
		"packet:eth1": {Interface: "eth1"},
		"eth1":        {Interface: "eth1"},
		"packet:eth1,queues=4,fanout=cpu,mtu=9000,promisc=off,vnet-hdr=off,qdisc-bypass=on": {
			Interface: "eth1", Queues: 4, Fanout: CPU, MTU: 9000, NoPromisc: true, NoVnetHdr: true, QdiscBypass: true,
		},
		"packet:eth1,queues=2,fanout=qm,promisc=on,vnet-hdr=on,qdisc-bypass=off": {Interface: "eth1", Queues: 2, Fanout: QM},
	} {
		got, err := ParseOptions(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
		} else if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: %s", s, diff)
		}
	}
	for s, want := range map[string]string{
		"packet":                      "no interface name",
		"packet:":                     "no interface name",
		"packet:a/b":                  "no interface name",
		"packet:0123456789abcdef":     "no interface name",
		"packet:e,queues=0":           "want a number from 1 to 64",
		"packet:e,queues=65":          "want a number from 1 to 64",
		"packet:e,mtu=67":             "want a number from 68 to 65521",
		"packet:e,queues=2,fanout=lb": "want hash, cpu or qm",
		"packet:e,fanout=hash":        "add queues=N",
		"packet:e,promisc=yes":        "want on or off",
		"packet:e,mtu=100,mtu=100":    "given twice",
		"packet:e,promisc":            "want KEY=VALUE",
		"packet:e,speed=1":            `unknown key "speed": known are queues=N`,
	} {
		if _, err := ParseOptions(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	inNetns(t)
	must(t, netlink.LinkSetDown(netdevtest.Link(t, farName)))
	for name, want := range map[string]string{
		"nothere": "no such device: `ip link` lists", farName: "ip link set pk1 up", "": "no interface name",
	} {
		if _, err := Open(Options{Interface: name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
	if _, err := Open(Options{Interface: devName, Queues: MaxQueues + 1}); err == nil {
		t.Error("too many queues: no error")
	}
}

// TestOpenSets: the MTU is the guest's, and the interface's where that was smaller; the interface is promiscuous for as long as the
// device is open.
func TestOpenSets(t *testing.T) {
	inNetns(t)
	promisc := func() bool { return netdevtest.Link(t, devName).Attrs().Promisc > 0 }
	for _, c := range []struct {
		options     string
		guest, link int
		promisc     bool
	}{
		{"", testMTU, testMTU, true}, {",promisc=off", testMTU, testMTU, false}, {",mtu=1400", 1400, testMTU, true},
		{",mtu=20000", 20000, 20000, true}, {",queues=2", 20000, 20000, true},
	} {
		o, err := ParseOptions("packet:" + devName + c.options)
		must(t, err)
		d, err := Open(o)
		must(t, err)
		if got := d.Capabilities().MTU; got != c.guest || netdevtest.Link(t, devName).Attrs().MTU != c.link {
			t.Errorf("%q: mtu %d of the guest, %d of the interface; want %d, %d", c.options, got, netdevtest.Link(t, devName).Attrs().MTU, c.guest, c.link)
		}
		if promisc() != c.promisc {
			t.Errorf("%q: promiscuous is %v", c.options, promisc())
		}
		must(t, d.Close())
		must(t, d.Close())
		if promisc() {
			t.Errorf("%q: still promiscuous", c.options)
		}
	}
}

// TestShapes: rings hold the frames that they are for, and the kernel's rules are kept.
func TestShapes(t *testing.T) {
	for mtu := MinMTU; mtu <= MaxMTU; mtu += 37 {
		for _, header := range []int{0, 10} {
			d := &Device{mtu: mtu, header: header}
			send, recv := d.shapes()
			for _, s := range []shape{send, recv} {
				if s.slot%slotAlign != 0 || s.block%4096 != 0 || s.slot > s.block || s.bytes() > 16<<20 {
					t.Fatalf("mtu %d: %+v", mtu, s)
				}
			}
			if send.slot < sendData+header+mtu+etherMax || send.slots() < sendSlots {
				t.Fatalf("mtu %d: transmit ring %+v", mtu, send)
			}
			if recv.slot < min(recvHead+mtu+etherMax, maxRecvSlot) || recv.slots() < recvSlots/2 {
				t.Fatalf("mtu %d: receive ring %+v", mtu, recv)
			}
		}
	}
	if got := unix.SizeofTpacket2Hdr; got != sendData {
		t.Errorf("struct tpacket2_hdr has %d bytes, want %d", got, sendData)
	}
}
