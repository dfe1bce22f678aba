package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

// taskStatus returns a field of /proc/PID/status of each thread of a process.
func taskStatus(t *testing.T, pid int, field string) (values []string) {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(paths) < 3 {
		t.Fatalf("%d threads (%v), want several", len(paths), err)
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), "\n"+field+":")
		line, _, _ := strings.Cut(rest, "\n")
		values = append(values, strings.TrimSpace(line))
	}
	return values
}

// guestMemoryFlags returns the VmFlags of each mapping of guest memory.
func guestMemoryFlags(t *testing.T, pid int) (all []string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	guest := false
	for line := range strings.Lines(string(b)) {
		if first, _, _ := strings.Cut(line, " "); !strings.HasSuffix(first, ":") { // a mapping's first line
			guest = strings.Contains(line, "/memfd:vhosttest")
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && guest {
			all = append(all, flags)
		}
	}
	return all
}

func needConfinement(t *testing.T) {
	t.Helper()
	if s := confine.Supported(); !s.Seccomp || s.Landlock == 0 {
		require.Skip(t, "confine", "seccomp %v, Landlock %v", s.Seccomp, s.LandlockErr)
	}
}

// kindCase is a vhostd with one kind of device, and what its guest can do with it.
type kindCase struct {
	args    []string
	caps    confine.Caps // that it keeps when root starts it
	traffic func(t *testing.T, g *vhosttest.Guest)
}

// exchange sends a frame each way, over a wire at the other end of the device.
func exchange(w *netdevtest.Wire) func(*testing.T, *vhosttest.Guest) {
	return func(t *testing.T, g *vhosttest.Guest) {
		sent := vhosttest.Frame(1, 200)
		sendFrame(t, g, sent)
		w.Recv(func(f []byte) bool { return bytes.Equal(f, sent) })
		w.Send(vhosttest.Frame(2, 300))
		recvFrame(t, g, func(f []byte) bool { return bytes.Equal(f, vhosttest.Frame(2, 300)) })
	}
}

func sendFrame(t *testing.T, g *vhosttest.Guest, frame []byte) {
	t.Helper()
	if err := g.Send(0, virtio.NetHdr{}, frame, nil); err != nil {
		t.Fatal(err)
	}
}

// recvFrame waits for a frame that pick takes.
func recvFrame(t *testing.T, g *vhosttest.Guest, pick func([]byte) bool) []byte {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if _, f, err := g.Recv(0, patience); err != nil {
			t.Fatal(err)
		} else if pick(f) {
			return f
		}
	}
	t.Fatal("the frame did not come")
	return nil
}

// kindCases are a vhostd of each kind. Kinds that need interfaces are in lab.Here.
func kindCases(t *testing.T, lab *netdevtest.Lab) map[string]kindCase {
	peer, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	free, err := net.ListenPacket("udp4", "127.0.0.1:0") // a port that nobody else has
	if err != nil {
		t.Fatal(err)
	}
	local := free.LocalAddr().String()
	free.Close()
	within := []string{"ip", "netns", "exec", lab.Here, binary, "run"}
	run := []string{binary, "run"}
	return map[string]kindCase{
		"null": {append(slices.Clip(run), "--net", "null,echo=on"), 0, func(t *testing.T, g *vhosttest.Guest) {
			sendFrame(t, g, vhosttest.Frame(1, 100))
			recvFrame(t, g, func(f []byte) bool { return bytes.Equal(f, vhosttest.Frame(1, 100)) })
		}},
		"user": {append(slices.Clip(run), "--net", "user"), 0, func(t *testing.T, g *vhosttest.Guest) { datagramToHost(t, g, peer) }},
		"dgram": {append(slices.Clip(run), "--net", "dgram:local="+local+",remote="+peer.LocalAddr().String()), confine.CapIPCLock,
			func(t *testing.T, g *vhosttest.Guest) { throughTunnel(t, g, peer) }},
		"tap":    {append(slices.Clip(within), "--net", "tap:vt0", "--queues", "2"), 0, nil},
		"packet": {append(slices.Clip(within), "--net", "packet:v0"), 0, exchange(lab.Wire(lab.There, "v0"))},
		"packet, two pairs": {append(slices.Clip(within), "--net", "packet:v0,queues=2"), confine.CapNetRaw,
			func(t *testing.T, g *vhosttest.Guest) { sendFrame(t, g, vhosttest.Frame(1, 100)) }},
		"xdp": {append(slices.Clip(within), "--net", "xdp:v0,mode=generic"), confine.CapNetRaw | confine.CapBPF | confine.CapIPCLock,
			exchange(lab.Wire(lab.There, "v0"))},
		"xdp, guest memory registered": {append(slices.Clip(within), "--net", "xdp:v0,mode=generic,no-balloon=on"),
			confine.CapNetRaw | confine.CapBPF | confine.CapIPCLock, exchange(lab.Wire(lab.There, "v0"))},
	}
}

// TestConfinedByKind: a vhostd of every kind that runs, with a guest, has on all of its threads what is promised and no more; frames pass, the
// guest comes again, and the sockets are gone at the end.
func TestConfinedByKind(t *testing.T) {
	needConfinement(t)
	lab := netdevtest.NewLab(t, "netns", 1500, 2)
	for name, c := range kindCases(t, lab) {
		t.Run(name, func(t *testing.T) {
			path := socketIn(t)
			cmd := exec.Command(c.args[0], append(c.args[1:], "--socket-path", path)...)
			p := launch(t, cmd)
			if name == "tap" {
				c.traffic = exchange(lab.For(t).Wire(lab.Here, "vt0"))
			}
			for range 2 { // the second front-end finds a confined daemon
				g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
				c.traffic(t, g)
				checkConfined(t, cmd.Process.Pid, c.caps)
				flags := guestMemoryFlags(t, cmd.Process.Pid)
				if len(flags) == 0 {
					t.Error("no guest memory is mapped: this test shows nothing")
				}
				for _, f := range flags {
					if !slices.Contains(strings.Fields(f), "dd") {
						t.Errorf("guest memory would be in a core dump: VmFlags%s", f)
					}
				}
				g.Close()
			}
			if got := command(t, "stats", "--socket-path", path); got.code != 0 {
				t.Errorf("stats: %+v", got)
			}
			if code := p.end(syscall.SIGTERM); code != exitOK || exists(path) || exists(path+controlSuffix) {
				t.Errorf("exit code %d, socket left %v, control socket left %v", code, exists(path), exists(path+controlSuffix))
			}
		})
	}
}

// checkConfined looks at every thread.
func checkConfined(t *testing.T, pid int, caps confine.Caps) {
	t.Helper()
	have := fmt.Sprintf("%016x", uint64(caps))
	for field, want := range map[string]string{
		"Seccomp": "2", "NoNewPrivs": "1", "CapInh": fmt.Sprintf("%016x", 0), "CapAmb": fmt.Sprintf("%016x", 0),
		"CapPrm": have, "CapEff": have, "CapBnd": have,
	} {
		for _, got := range taskStatus(t, pid, field) {
			if got != want {
				t.Errorf("%s is %s on a thread, want %s", field, got, want)
			}
		}
	}
}

// TestEveryKindSaysWhatItNeeds: a kind that is new has to be in the test above.
func TestEveryKindSaysWhatItNeeds(t *testing.T) {
	tested := []string{"null", "user", "dgram", "tap", "packet", "xdp"}
	same := map[string]string{"vxlan": "dgram", "geneve": "dgram"} // as far as the kernel is asked for anything
	for _, k := range kinds {
		if !slices.Contains(tested, k.name) && !slices.Contains(tested, same[k.name]) {
			t.Errorf("--net %s is not in TestConfinedByKind", k.name)
		}
	}
}

// datagramToHost has the guest ask for its router's address and send a datagram to the host's loopback, for which vhostd opens a socket.
func datagramToHost(t *testing.T, g *vhosttest.Guest, host net.PacketConn) {
	t.Helper()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x15}
	guest, router := net.IPv4(10, 0, 2, 15).To4(), net.IPv4(10, 0, 2, 2).To4()
	sendFrame(t, g, frameOf(t,
		&layers.Ethernet{SrcMAC: mac, DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{AddrType: 1, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
			SourceHwAddress: mac, SourceProtAddress: guest, DstHwAddress: make([]byte, 6), DstProtAddress: router}))
	var answer layers.ARP
	recvFrame(t, g, func(f []byte) bool {
		return len(f) >= 42 && f[12] == 8 && f[13] == 6 && answer.DecodeFromBytes(f[14:], gopacket.NilDecodeFeedback) == nil && answer.Operation == layers.ARPReply
	})
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: guest, DstIP: router}
	udp := &layers.UDP{SrcPort: 4000, DstPort: layers.UDPPort(host.LocalAddr().(*net.UDPAddr).Port)}
	_ = udp.SetNetworkLayerForChecksum(ip)
	sendFrame(t, g, frameOf(t, &layers.Ethernet{SrcMAC: mac, DstMAC: answer.SourceHwAddress, EthernetType: layers.EthernetTypeIPv4}, ip, udp,
		gopacket.Payload("hello")))
	b := make([]byte, 2048)
	_ = host.SetReadDeadline(time.Now().Add(patience))
	if n, _, err := host.ReadFrom(b); err != nil || string(b[:n]) != "hello" {
		t.Fatalf("%q (%v), want the guest's datagram", b[:max(n, 0)], err)
	}
}

func frameOf(t *testing.T, all ...gopacket.SerializableLayer) []byte {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// throughTunnel has frames of both sizes leave, copied and by page, and one come back.
func throughTunnel(t *testing.T, g *vhosttest.Guest, peer net.PacketConn) {
	t.Helper()
	b := make([]byte, 65536)
	_ = peer.SetReadDeadline(time.Now().Add(patience))
	var from net.Addr
	for i, n := range []int{100, 1400} {
		sendFrame(t, g, vhosttest.Frame(uint64(i), n))
		got, a, err := peer.ReadFrom(b)
		if err != nil || !bytes.Equal(b[:got], vhosttest.Frame(uint64(i), n)) {
			t.Fatalf("%d bytes (%v), want the frame of %d", got, err, n)
		}
		from = a
	}
	if _, err := peer.WriteTo(vhosttest.Frame(9, 500), from); err != nil {
		t.Fatal(err)
	}
	recvFrame(t, g, func(f []byte) bool { return bytes.Equal(f, vhosttest.Frame(9, 500)) })
}
