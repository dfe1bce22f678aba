package xdp

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Offsets in struct xdp_md, in bytes.
const (
	mdData       = 0
	mdDataEnd    = 4
	mdQueueIndex = 16
)

// Verdicts of an XDP program (enum xdp_action).
const (
	xdpDrop = 1
	xdpPass = 2
)

// program is the XDP program on the interface, with its maps. It is there for as long as its link's descriptor is open, so it goes with the
// process, however that ends.
type program struct {
	sockets *ebpf.Map // by queue of the interface
	long    *ebpf.Map // one count by CPU: frames that were dropped because they are too long
	prog    *ebpf.Program
	link    link.Link
	native  bool
	frags   bool // frames may come in several pieces
}

// newProgram attaches the program: frames of up to frame bytes that come at queue go to that queue's socket, and longer ones are dropped, as are all while
// there is no socket. Those that come at others go their way. queue may be AllQueues, of which there are n.
func newProgram(ifindex int, m Mode, queue, n, frame int) (*program, error) {
	_ = rlimit.RemoveMemlock() // kernels before 5.11 count the maps; if it fails, the maps' error says so
	p := &program{}
	if err := p.load(queue, n, frame); err != nil {
		return nil, errors.Join(fmt.Errorf("loading the XDP program: %w", err), p.close())
	}
	if err := p.attach(ifindex, m); err != nil {
		return nil, errors.Join(fmt.Errorf("attaching the XDP program: %w", err), p.close())
	}
	return p, nil
}

func (p *program) load(queue, n, frame int) (err error) {
	p.sockets, err = ebpf.NewMap(&ebpf.MapSpec{Name: "vhostd_sockets", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: uint32(n)})
	if err != nil {
		return err
	}
	p.long, err = ebpf.NewMap(&ebpf.MapSpec{Name: "vhostd_long", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return err
	}
	// Frames in several pieces are known from Linux 5.18 on; before, there are none.
	p.prog, err = ebpf.NewProgram(p.spec(queue, frame, true))
	if err == nil {
		p.frags = true
		return nil
	}
	var old error
	if p.prog, old = ebpf.NewProgram(p.spec(queue, frame, false)); old != nil {
		return err
	}
	return nil
}

func (p *program) spec(queue, frame int, frags bool) *ebpf.ProgramSpec {
	s := &ebpf.ProgramSpec{Name: "vhostd", Type: ebpf.XDP, License: "Apache-2.0", Instructions: p.instructions(queue, frame, frags)}
	if frags {
		s.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	return s
}

func (p *program) instructions(queue, frame int, frags bool) (code asm.Instructions) {
	code = append(code, asm.Mov.Reg(asm.R6, asm.R1))
	if queue != AllQueues {
		code = append(code,
			asm.LoadMem(asm.R2, asm.R6, mdQueueIndex, asm.Word),
			asm.JNE.Imm(asm.R2, int32(queue), "pass"))
	}
	if frags {
		code = append(code, asm.FnXdpGetBuffLen.Call())
	} else {
		code = append(code,
			asm.LoadMem(asm.R0, asm.R6, mdDataEnd, asm.Word),
			asm.LoadMem(asm.R1, asm.R6, mdData, asm.Word),
			asm.Sub.Reg(asm.R0, asm.R1))
	}
	code = append(code,
		asm.JGT.Imm(asm.R0, int32(frame), "long"),
		asm.LoadMapPtr(asm.R1, p.sockets.FD()),
		asm.LoadMem(asm.R2, asm.R6, mdQueueIndex, asm.Word),
		asm.Mov.Imm(asm.R3, xdpDrop), // without a socket
		asm.FnRedirectMap.Call(),
		asm.Return(),
		// Too long: count and drop.
		asm.StoreImm(asm.R10, -4, 0, asm.Word).WithSymbol("long"),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, p.long.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord), // nobody else counts on this CPU
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return())
	if queue != AllQueues {
		code = append(code, asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("pass"), asm.Return())
	}
	return code
}

// attach puts the program on the interface, in the driver or, where that cannot, in the kernel's stack.
func (p *program) attach(ifindex int, m Mode) (err error) {
	if m != Generic {
		p.link, err = link.AttachXDP(link.XDPOptions{Program: p.prog, Interface: ifindex, Flags: link.XDPDriverMode})
		p.native = err == nil
		if err == nil || m == Native || m == ZeroCopy || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EPERM) {
			return err
		}
	}
	l, generic := link.AttachXDP(link.XDPOptions{Program: p.prog, Interface: ifindex, Flags: link.XDPGenericMode})
	if generic != nil {
		return errors.Join(err, generic)
	}
	p.link = l
	return nil
}

// dropped is how many frames were too long.
func (p *program) dropped() (n uint64) {
	var each []uint64
	if p.long.Lookup(uint32(0), &each) != nil {
		return 0 // closed
	}
	for _, c := range each {
		n += c
	}
	return n
}

func (p *program) close() error {
	var errs []error
	if p.link != nil {
		errs = append(errs, p.link.Close())
	}
	if p.prog != nil {
		errs = append(errs, p.prog.Close())
	}
	for _, m := range []*ebpf.Map{p.sockets, p.long} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}
