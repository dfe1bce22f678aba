package udp_test

import (
	"bytes"
	"net"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/zerocopy"
)

// TestSocketLimit: MSG_ZEROCOPY has a limit of its own. The frames above it are copied, in their turn, and none is lost.
func TestSocketLimit(t *testing.T) {
	r := newRig(t, msg+",zerocopy=on,zerocopy-pending=1000")
	defer r.close()
	raw, err := r.far.conn.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		must(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)) // for all of them at once
	}))
	r.fill()
	const n = 400
	var frames [][]byte
	var batch []*zerocopy.Buffer
	for i := range n {
		frames = append(frames, netdevtest.Frame(1000, uint32(i)))
		batch = append(batch, r.buffer(frames[i]))
	}
	if got := r.q.Send(batch); got != n {
		t.Fatalf("%d of %d frames taken", got, n)
	}
	st := r.dev.Stats()
	if st.InFlight == 0 || st.Limited == 0 || st.InFlight+int(st.Limited) > n || st.Pauses != 0 {
		t.Fatalf("%+v", st)
	}
	t.Logf("%d frames in flight, %d copied", st.InFlight, st.Limited)
	passed := n - st.InFlight - int(st.Limited) // before the interface held
	r.release("v0")
	r.send(netdevtest.Frame(100, 9))
	for i, want := range frames {
		if got := r.far.recv(); !bytes.Equal(got, want) {
			t.Fatalf("frame %d is another: order was not kept", i)
		}
	}
	outcomes := map[zerocopy.Outcome]int{}
	for range n + 1 {
		outcomes[r.next(t)]++
	}
	if outcomes[zerocopy.CopiedAnyway] < st.InFlight || outcomes[zerocopy.CopiedCap] < int(st.Limited) || outcomes[zerocopy.Dropped] != 0 {
		t.Errorf("%d passed; released as %v; %+v", passed, outcomes, st)
	}
	r.far.recv()
	r.send(netdevtest.Frame(1000, 1)) // the limit is forgotten with the last frame
	r.want(t, zerocopy.CopiedAnyway)
}

// TestRefusedAfterCounted: the kernel numbers a send before its firewall, say, refuses it. The frames around it are not taken for another.
func TestRefusedAfterCounted(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		l, d := toSink(t, engine+",zerocopy=on,ports=1,gso=off")
		const bad = 5000
		l.refuse("10.8.0.2/32", "i0", bad+36) // IPv4, UDP and VXLAN
		s, q := newSent(), d.Queue(0)
		names := map[int]zerocopy.Outcome{big: zerocopy.ZeroCopied, bad: zerocopy.Dropped}
		sizes := []int{big, bad, big, bad, bad, big, big, bad}
		for range 20 {
			var batch []*zerocopy.Buffer
			want := map[zerocopy.Outcome]int{}
			for _, n := range sizes {
				batch = append(batch, s.buffer(netdevtest.Frame(n, 1)))
				want[names[n]]++
			}
			if q.Send(batch) != len(batch) {
				t.Fatal("not taken")
			}
			for range batch {
				want[s.next(t)]--
			}
			for o, n := range want {
				if n != 0 {
					t.Fatalf("%v: %d too few", o, n)
				}
			}
		}
		if st := d.Stats(); st.InFlight != 0 || q.Counters().SendDropped != 80 {
			t.Errorf("%+v, %d dropped", st, q.Counters().SendDropped)
		}
	})
}

// refuse has the kernel refuse to send packets of n bytes to dst, with EPERM, as a firewall would.
func (l *lab) refuse(dst, dev string, n int32) {
	l.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.LWTOut, License: "MIT", Instructions: asm.Instructions{
		asm.LoadMem(asm.R1, asm.R1, 0, asm.Word), // __sk_buff.len
		asm.Mov.Imm(asm.R0, 2),                   // BPF_DROP
		asm.JEq.Imm(asm.R1, n, "end"),
		asm.Mov.Imm(asm.R0, 0), // BPF_OK
		asm.Return().WithSymbol("end"),
	}})
	if err != nil {
		require.Skip(l, "bpf", "a program for a route: %v", err)
	}
	l.Cleanup(func() { prog.Close() })
	err = l.Enter(l.Here, func() error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		_, to, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		var e netlink.BpfEncap
		if err := e.SetProg(nl.LWT_BPF_OUT, prog.FD(), "refuse"); err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: to, Encap: &e, Scope: netlink.SCOPE_LINK})
	})
	if err != nil {
		require.Skip(l, "bpf", "a route with a program: %v", err)
	}
}

// TestWithoutIOUring: where the kernel forbids io_uring frames leave by page all the same, and the device says by what.
func TestWithoutIOUring(t *testing.T) {
	l := newLab(t, 1500)
	l.sink()
	open := func(options string) (d *udp.Device, err error) {
		o, err := udp.ParseOptions("vxlan:vni=42,local=10.8.0.1,remote=10.8.0.2" + options)
		must(t, err)
		l.In(l.Here, func() error {
			forbidIOUring(t)
			d, err = udp.Open(o)
			return nil
		})
		return d, err
	}
	if d, err := open(ring); err == nil || !strings.Contains(err.Error(), "io_uring") {
		t.Errorf("zerocopy-engine=io_uring without io_uring: %v, %v", d, err)
	}
	for _, policy := range []string{"", ",zerocopy=on"} {
		d, err := open(policy)
		must(t, err)
		if z := d.Capabilities().ZeroCopy; !strings.Contains(z, "msg_zerocopy") || !strings.Contains(z, "no io_uring") {
			t.Errorf("zero-copy %q", z)
		}
		s := newSent()
		for _, n := range []int{udp.DefaultZeroCopyMin, udp.DefaultMsgZeroCopyMin} {
			d.Queue(0).Send([]*zerocopy.Buffer{s.buffer(netdevtest.Frame(n, 1))})
		}
		if policy == "" {
			s.want(t, zerocopy.CopiedSmall, zerocopy.ZeroCopied)
		} else {
			s.want(t, zerocopy.ZeroCopied, zerocopy.ZeroCopied)
		}
		must(t, d.Close())
	}
}

// TestManySockets: frames of many flows leave through many sockets, in batches, and all of them are heard of, called or not.
func TestManySockets(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		_, d := toSink(t, engine+",zerocopy=on,ports=16,zerocopy-pending=300")
		s, q := newSent(), d.Queue(0)
		const rounds, n = 50, 64
		for round := range rounds {
			var batch []*zerocopy.Buffer
			for i := range n {
				frame := netdevtest.Frame(2000, uint32(i))
				frame[11] = byte(i * round)
				batch = append(batch, s.buffer(frame))
			}
			for len(batch) > 0 {
				batch = batch[q.Send(batch):]
				q.Reap()
			}
		}
		outcomes := map[zerocopy.Outcome]int{}
		for range rounds * n {
			outcomes[s.next(t)]++
		}
		if st := d.Stats(); outcomes[zerocopy.Dropped] != 0 || outcomes[zerocopy.ZeroCopied] < rounds*n/2 || st.InFlight != 0 || st.Most > 300 {
			t.Errorf("released as %v, %+v", outcomes, st)
		}
	})
}

// TestLockedMemoryLimit: without CAP_IPC_LOCK RLIMIT_MEMLOCK bounds what is in flight. Above it frames are copied; where not one fits the throttle
// ends the attempts.
func TestLockedMemoryLimit(t *testing.T) {
	r := newRig(t, msg)
	defer r.close()
	r.fill()
	var old unix.Rlimit
	must(t, unix.Prlimit(0, unix.RLIMIT_MEMLOCK, nil, &old))
	defer func() { must(t, unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &old, nil)) }()
	limit := func(pages uint64) {
		must(t, unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: pages << 12, Max: old.Max}, nil))
	}
	outcomes := map[zerocopy.Outcome]int{}
	send := func(n int) {
		must(t, r.Enter(r.Here, func() error {
			if err := dropLockedMemory(); err != nil {
				return err
			}
			for range n {
				r.send(netdevtest.Frame(big, 1))
			}
			return nil
		}))
	}
	limit(20)
	send(10)
	for range 10 - r.dev.Stats().InFlight {
		outcomes[r.next(t)]++
	}
	if st := r.dev.Stats(); st.InFlight == 0 || st.InFlight > 5 || st.Limited != uint64(10-st.InFlight) || st.Pauses != 0 {
		t.Errorf("20 pages may be locked: %+v, released as %v", st, outcomes)
	}
	held := r.dev.Stats().InFlight
	r.purge("v0")
	for range held {
		r.next(t)
	}
	limit(0)
	send(300)
	for range 300 {
		outcomes[r.next(t)]++
	}
	if st := r.dev.Stats(); st.Pauses == 0 || st.Limited > 200 || outcomes[zerocopy.Dropped] != 0 || outcomes[zerocopy.CopiedFallback] == 0 {
		t.Errorf("no memory may be locked: %+v, released as %v", st, outcomes)
	}
}

// dropLockedMemory takes CAP_IPC_LOCK from the calling thread, so that limits hold for it.
func dropLockedMemory() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	data[0].Effective &^= 1 << unix.CAP_IPC_LOCK
	return unix.Capset(&hdr, &data[0])
}
