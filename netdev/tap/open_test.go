package tap

import (
	"bytes"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func addBridge(t testing.TB, name string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
	must(t, netlink.LinkSetUp(netdevtest.Link(t, name)))
	return netdevtest.Link(t, name)
}

// openFails checks that Open refuses the options with an error that says all of want, and leaves no descriptor behind.
func openFails(t *testing.T, s string, want ...string) {
	t.Helper()
	o, err := ParseOptions(s)
	must(t, err)
	before := countFDs(t)
	d, err := Open(o)
	if err == nil {
		d.Close()
		t.Errorf("%s: opened", s)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: error %q lacks %q", s, err, w)
		}
	}
	if after := countFDs(t); after != before-len(o.FDs) {
		t.Errorf("%s: %d descriptors before and %d after, %d of them passed", s, before, after, len(o.FDs))
	}
}

func countFDs(t testing.TB) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(e)
}

func TestOpenConfigures(t *testing.T) {
	inNetns(t)
	br := addBridge(t, "br0")
	before := countFDs(t)
	mac := net.HardwareAddr{0x52, 0x54, 0, 0xaa, 0xbb, 1}
	d := open(t, "tap:vnet0,bridge=br0,mtu=9000,queues=3,mac="+mac.String())
	link := netdevtest.Link(t, "vnet0")
	a, tun := link.Attrs(), link.(*netlink.Tuntap)
	if a.MTU != 9000 || a.MasterIndex != br.Attrs().Index || !bytes.Equal(a.HardwareAddr, mac) || a.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("the interface is %+v", a)
	}
	if tun.Queues != 3 || !tun.NonPersist || tun.Flags&netlink.TUNTAP_VNET_HDR == 0 {
		t.Errorf("the tap is %+v", tun)
	}
	c := d.Capabilities()
	if c.Kind != "tap" || c.Name != "vnet0" || c.MaxPairs != 3 || c.MTU != 9000 || c.ZeroCopy != "never" {
		t.Errorf("capabilities %+v", c)
	}
	must(t, d.Close())
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before and %d after", before, after)
	}
	if _, err := netlink.LinkByName("vnet0"); err == nil {
		t.Error("the tap is still there after Close")
	}
}

func TestOpenDown(t *testing.T) {
	inNetns(t)
	open(t, "tap:t0,up=off")
	if netdevtest.Link(t, "t0").Attrs().RawFlags&unix.IFF_UP != 0 {
		t.Error("up")
	}
}

// TestOpenAttaches: a tap that was there is used as it is, and stays.
func TestOpenAttaches(t *testing.T) {
	inNetns(t)
	for _, s := range []string{"tap:t0,persist", "tap:t0", "tap:t1,queues=2,persist=on", "tap:t1", "tap:t1,queues=2"} {
		must(t, open(t, s).Close())
	}
	for _, name := range []string{"t0", "t1"} {
		if netdevtest.Link(t, name).(*netlink.Tuntap).NonPersist {
			t.Errorf("%s does not persist", name)
		}
	}
	if d := open(t, "tap"); d.Capabilities().Name != "tap0" {
		t.Errorf("without a name the tap is %q", d.Capabilities().Name)
	}
}

func TestOpenErrors(t *testing.T) {
	inNetns(t)
	must(t, open(t, "tap:single,persist").Close())
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI}))
	open(t, "tap:held")
	addBridge(t, "br0")
	addBridge(t, "br1")
	open(t, "tap:port,bridge=br0,queues=2")

	openFails(t, "tap:held", "another process holds it")
	openFails(t, "tap:single,queues=2", "exists with a single queue", "queues=1")
	openFails(t, "tap:tun0", "is a tun")
	openFails(t, "tap:br0", "is a bridge", "another name")
	openFails(t, "tap:new,bridge=br9", "bridge br9", "ip link add br9 type bridge")
	openFails(t, "tap:new,bridge=held", "held is a tuntap")
	openFails(t, "tap:port,bridge=br1", "port of another bridge", "ip link set port nomaster")
	openFails(t, "tap:macvtap=nothing", "ip link add nothing link DEVICE type macvtap")
	openFails(t, "tap:macvtap=br0", "is a bridge")
	openFails(t, "tap:macvtap=/dev/null", "is it the node of a macvtap interface?")
	openFails(t, "tap:macvtap=/dev/tapNONE", "opening /dev/tapNONE", "modprobe macvtap")
	if _, err := netlink.LinkByName("new"); err == nil {
		t.Error("a tap that could not be set up is still there")
	}
}

// withoutNetAdmin runs f on this thread without CAP_NET_ADMIN.
func withoutNetAdmin(t *testing.T, f func()) {
	t.Helper()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, unix.Capget(&hdr, &data[0]))
	old := data
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	must(t, unix.Capset(&hdr, &data[0]))
	defer func() { must(t, unix.Capset(&hdr, &old[0])) }()
	f()
}

// TestOpenUnprivileged: without CAP_NET_ADMIN a tap that was prepared for the user works; the errors of others say how to prepare it.
func TestOpenUnprivileged(t *testing.T) {
	inNetns(t)
	prepared := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: "mine"}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
	}
	must(t, netlink.LinkAdd(prepared))
	for _, f := range prepared.Fds {
		must(t, unix.IoctlSetInt(int(f.Fd()), unix.TUNSETOWNER, os.Geteuid()))
		f.Close()
	}
	withoutNetAdmin(t, func() {
		openFails(t, "tap:new", "operation not permitted", "CAP_NET_ADMIN", "ip tuntap add dev new mode tap user $USER vnet_hdr`")
		openFails(t, "tap:new,queues=2", "vnet_hdr multi_queue")
		openFails(t, "tap:mine", "setting up", "ip link set mine up")
		openFails(t, "tap:mine,mtu=9000", "setting mtu 9000", "ip link set mine mtu 9000")
	})
	must(t, netlink.LinkSetUp(netdevtest.Link(t, "mine")))
	withoutNetAdmin(t, func() {
		d := open(t, "tap:mine,mtu=1500")
		negotiate(t, d, mergeable|largeRecv)
		for _, f := range Check() {
			if f.OK != (f.What != "CAP_NET_ADMIN") || f.OK == (f.Fix != "") {
				t.Errorf("Check without the capability: %+v", f)
			}
		}
	})
	for _, f := range Check() {
		if !f.OK {
			t.Errorf("Check: %+v", f)
		}
	}
}

// rawTap opens a queue as a VMM's manager would, before it passes the descriptor on.
func rawTap(t *testing.T, name string, flags uint16) int {
	t.Helper()
	fd, err := unix.Open(sys.TunPath, unix.O_RDWR, 0)
	must(t, err)
	_, err = sys.TunSetIff(fd, name, flags)
	must(t, err)
	return fd
}

// exchange sends a frame each way through every queue of d, and none of them needs an offload.
func exchange(t *testing.T, d *Device) {
	t.Helper()
	must(t, netlink.LinkSetUp(netdevtest.Link(t, d.name)))
	w := newWire(t, d.name)
	for i := range d.queues {
		want := testFrame(200+i, uint32(i))
		var b buffers
		b.add(virtio.NetHdr{}, want)
		b.sendAll(t, d.Queue(i), zerocopy.Copied)
		wantFrame(t, w.recv(), want)
	}
	must(t, d.SetPairs(1))
	for _, f := range []virtio.Features{legacy, plain, mergeable} {
		g := newGuest(t, 8, f)
		g.post(2, 2048)
		w.Send(testFrame(300, 7))
		got := g.recv(d.Queue(0))
		wantFrame(t, got.data, testFrame(300, 7))
		if got.hdr.Flags != 0 || got.hdr.GSOType != 0 || got.hdr.HdrLen != 0 {
			t.Errorf("header %+v", got.hdr)
		}
	}
}

func TestInherited(t *testing.T) {
	inNetns(t)
	const base = sys.TunTap | sys.TunNoPI
	for name, fds := range map[string][]int{
		"vnet":  {rawTap(t, "vnet", base|sys.TunVnetHdr)},
		"bare":  {rawTap(t, "bare", base)},
		"multi": {rawTap(t, "multi", base|sys.TunVnetHdr|sys.TunMultiQueue), rawTap(t, "multi", base|sys.TunVnetHdr|sys.TunMultiQueue)},
	} {
		d := openWith(t, Options{FDs: fds})
		c := d.Capabilities()
		if c.Name != name || c.MaxPairs != len(fds) || c.MTU != 1500 {
			t.Errorf("%s: capabilities %+v", name, c)
		}
		if (c.FromGuest != 0) != (name != "bare") || (c.ToGuest != 0) != (name != "bare") {
			t.Errorf("%s: offloads %#x, %#x", name, c.FromGuest, c.ToGuest)
		}
		if netdevtest.Link(t, name).Attrs().RawFlags&unix.IFF_UP != 0 {
			t.Errorf("%s: set up unasked", name)
		}
		negotiate(t, d, mergeable|largeRecv)
		exchange(t, d)
	}
}

func TestInheritedErrors(t *testing.T) {
	inNetns(t)
	var pipe [2]int
	must(t, unix.Pipe(pipe[:]))
	defer unix.Close(pipe[1])
	tun, err := unix.Open(sys.TunPath, unix.O_RDWR, 0)
	must(t, err)
	const base = sys.TunTap | sys.TunNoPI
	for _, c := range []struct {
		fds  []int
		want string
	}{
		{[]int{pipe[0]}, "it is no tap"},
		{[]int{tun}, "TUNSETIFF comes before"},
		{[]int{rawTap(t, "l3", unix.IFF_TUN|sys.TunNoPI)}, "which carries no Ethernet frames"},
		{[]int{rawTap(t, "pi", sys.TunTap)}, "IFF_NO_PI"},
		{[]int{rawTap(t, "a", base), rawTap(t, "b", base)}, "all must be of one interface"},
	} {
		before := countFDs(t)
		if _, err := Open(Options{FDs: c.fds}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: error %v, want one with %q", c.fds, err, c.want)
		}
		if after := countFDs(t); after != before-len(c.fds) {
			t.Errorf("%q: %d descriptors of %d are not closed", c.want, after-before+len(c.fds), len(c.fds))
		}
	}
	if _, err := Open(Options{FDs: []int{1 << 19}}); !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "FD_CLOEXEC") {
		t.Errorf("closed descriptor: %v", err)
	}
}

// TestInheritedElsewhere: the interface of a descriptor can be in another namespace, where it cannot be set up from here.
func TestInheritedElsewhere(t *testing.T) {
	inNetns(t)
	open(t, "tap:t0,mtu=1000") // not the one that is meant
	here, err := netns.Get()
	must(t, err)
	defer here.Close()
	there, err := netns.New()
	must(t, err)
	defer there.Close()
	const flags = sys.TunTap | sys.TunNoPI | sys.TunVnetHdr | sys.TunMultiQueue
	fds := []int{rawTap(t, "t0", flags), rawTap(t, "t0", flags)}
	must(t, netns.Set(here))
	if d := openWith(t, Options{FDs: fds[:1]}); d.Capabilities().MTU != 0 {
		t.Errorf("the MTU is %d, which is that of another interface", d.Capabilities().MTU)
	}
	_, err = Open(Options{FDs: fds[1:], MTU: 2000})
	if err == nil || !strings.Contains(err.Error(), "the t0 in this network namespace is another one") {
		t.Errorf("setting the MTU: %v", err)
	}
	if got := netdevtest.Link(t, "t0").Attrs().MTU; got != 1000 {
		t.Errorf("the other interface's MTU is %d now", got)
	}
}

func TestOffloadFlags(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	c := d.Capabilities()
	const always = offload.Csum | offload.TSO4 | offload.TSO6 | offload.ECN | offload.UFO
	if !c.FromGuest.Has(always) || !c.ToGuest.Has(always&^offload.UFO) {
		t.Errorf("offloads from the guest %#x, to it %#x", c.FromGuest, c.ToGuest)
	}
	for _, x := range []struct {
		accept, want offload.Set
		flags        uint
	}{
		{0, 0, 0},
		{offload.TSO4 | offload.TSO6, 0, 0}, // nothing goes without Csum
		{offload.Csum, offload.Csum, unix.TUN_F_CSUM},
		{offload.Csum | offload.ECN, offload.Csum, unix.TUN_F_CSUM}, // ECN is TSO's
		{offload.Csum | offload.TSO4 | offload.ECN, offload.Csum | offload.TSO4 | offload.ECN, unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO_ECN},
		{offload.Csum | offload.USO4, offload.Csum, unix.TUN_F_CSUM}, // USO4 and USO6 are one
	} {
		flags, covered := flagsFor(x.accept)
		if flags != x.flags || covered != x.want {
			t.Errorf("flagsFor(%#x) is %#x, %#x; want %#x, %#x", x.accept, flags, covered, x.flags, x.want)
		}
		got, err := d.setOffload(x.accept)
		if err != nil || got != x.want {
			t.Errorf("setOffload(%#x) is %#x, %v", x.accept, got, err)
		}
	}
	must(t, d.SetOffloads(offload.All))
}
