package backend_test

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// What the low four bits of a step of the script say; the four above are a number, and more bytes may follow.
const (
	sessRaw      = iota // a length, and that many bytes as they are, with as many descriptors of all kinds
	sessMessage         // a request, a length and the payload, with as many descriptors
	sessFeatures        // negotiation of all features, those of the next byte excepted
	sessMemory          // guest memory: all at once, or region by region, or one away
	sessStart           // a queue is started as it should be
	sessBase            // a queue is stopped
	sessEnable          // a queue is enabled or disabled
	sessPoke            // the guest writes two bytes anywhere: region, offset, value
	sessOffer           // the guest makes chains available and kicks
	sessTruncate        // a memory file shrinks to some pages, or grows again
	sessFDs             // kick, call or err descriptor of a queue, of any kind
	sessDevice          // reset, status, RARP, MTU, configuration
	sessBack            // a back channel
	sessWait            // what was sent so far gets its time
	sessAgain           // the front-end hangs up and comes again
)

// sessionSeeds are sequences that get far.
func sessionSeeds() [][]byte {
	up := []byte{sessFeatures, 0, sessMemory, sessStart, sessEnable | 1<<6, sessStart | 1<<4, sessEnable | 5<<4, sessWait}
	with := func(more ...byte) []byte { return append(append([]byte{}, up...), more...) }
	packed := append([]byte{sessFeatures, 1}, up[2:]...)
	return [][]byte{
		with(sessOffer|1<<4, 8, sessOffer, 8, sessWait, sessBase|1<<4, sessBase, sessStart|1<<4, sessOffer|1<<4, 4, sessWait),
		append(packed, sessOffer|1<<4, 8, sessOffer, 64, sessWait, sessOffer|1<<4, 8, sessWait, sessTruncate, 9, sessOffer|1<<4, 8, sessWait, sessBase|1<<4, sessStart|1<<4, sessWait),
		with(sessOffer|1<<4, 8, sessTruncate, 0, sessWait, sessAgain, sessTruncate, 16, sessFeatures, 0, sessMemory|1<<4),
		with(sessPoke, 0, 0x41, 8, 0xff, 0x00, sessOffer|1<<4, 60, sessWait, sessPoke, 1, 0, 0, 3, 1, sessOffer|1<<4, 2, sessMemory|2<<4, sessWait),
		with(sessFDs|1<<4, 3, sessFDs|1<<4, 0x14, sessFDs|1<<4, 0x25, sessOffer|1<<4, 8, sessWait, sessDevice, 1, sessDevice|1<<4, 0, sessDevice|2<<4, 7),
		with(sessBack, 0, sessBack, 1, sessDevice|3<<4, 68, sessDevice|4<<4, 0, sessMemory|3<<4, sessMemory|4<<4, sessWait),
		{sessMessage, 1, 0, sessMessage | 1<<4, 5, 8, 1, 0, 0, 0, 0, 0, 0, 0, sessRaw | 2<<4, 12, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, sessRaw, 3, 1, 0, 0},
		with(sessPoke, 1, 0, 0, 1, 1, sessPoke, 1, 2, 0, 54, 0, sessPoke, 1, 4, 0, 100, 0, sessOffer|1<<4, 16, sessWait),
	}
}

// Guest memory is two regions that touch, of regionSize bytes each. Each queue has its ring in the first one, at a place of ringSpace bytes:
// descriptors, then available and used ring; its buffers are in the second one.
const (
	regionSize = 1 << 16
	ringSpace  = 1 << 14
	ringAvail  = 1 << 12
	ringUsed   = 1 << 13
	ringSize   = 64 // descriptors
	bufSize    = regionSize / ringSize
	userBase   = 0x7f00_0000_0000
)

// write is how the guest writes: through the file, since the memory may be gone.
func (h *hostile) write(region int, off uint64, v ...any) {
	b := []byte{}
	for _, x := range v {
		b, _ = binary.Append(b, binary.NativeEndian, x)
	}
	_, _ = unix.Pwrite(h.files[region], b, int64(off))
}

func (h *hostile) truncate(region int, n int64) {
	if err := unix.Ftruncate(h.files[region], n); err != nil {
		h.Fatal(err)
	}
}

// layOut writes descriptors of one buffer each, with all of them in the available rings, of which the index says that there are none.
func (h *hostile) layOut() {
	for q := range uint64(4) {
		for i := range uint64(ringSize) {
			flags := uint16(virtio.DescWrite)
			if q%2 == 1 {
				flags = 0
			}
			h.write(0, q*ringSpace+i*virtio.DescSize, regionSize+i*bufSize, uint32(bufSize), flags, uint16(0))
			h.write(0, q*ringSpace+ringAvail+4+2*i, uint16(i))
		}
	}
	tcp := []byte{0x45, 0, 3, 0xdc, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10}
	for i := range uint64(ringSize) {
		h.write(1, i*bufSize+virtio.NetHdrSize+12, []byte{8, 0}, tcp)
		h.write(1, i*bufSize, byte(i%2), byte(i%2), uint16(54), uint16(100+100*i), uint16(34), uint16(16)) // every other one is to be cut
	}
}

// play plays the script, each step as far as its bytes go.
func (h *hostile) play(script []byte) {
	for steps := 0; len(script) > 0 && steps < 100; steps++ {
		n := int(script[0] >> 4)
		op := script[0] & 15
		script = script[1:]
		next := func() byte {
			if len(script) == 0 {
				return 0
			}
			b := script[0]
			script = script[1:]
			return b
		}
		take := func(n int) []byte {
			b := script[:min(n, len(script))]
			script = script[len(b):]
			return b
		}
		switch op {
		case sessRaw:
			h.raw(take(int(next())), h.odd(n, n)...)
		case sessMessage:
			req := vhostuser.Request(next())
			h.message(req, take(int(next())), h.odd(n&7, n)...)
		case sessFeatures:
			h.features(next())
		case sessMemory:
			h.memory(n)
		case sessPoke:
			b := take(5)
			if len(b) == 5 {
				h.write(int(b[0]&1), uint64(binary.LittleEndian.Uint16(b[1:])), binary.LittleEndian.Uint16(b[3:]))
			}
		case sessTruncate:
			h.truncate(n&1, int64(next()&31)<<12)
		case sessWait:
			h.settle()
		case sessAgain:
			h.hangUp()
			h.connect()
		default:
			h.queueStep(op, n, next)
		}
	}
}

// queueStep plays a step that is about a queue, or the device.
func (h *hostile) queueStep(op byte, n int, next func() byte) {
	q := uint32(n & 3)
	switch op {
	case sessStart:
		h.start(q)
	case sessBase:
		h.message(vhostuser.ReqGetVringBase, u32s(q, 0))
	case sessEnable:
		h.message(vhostuser.ReqSetVringEnable, u32s(q, uint32(n>>2&1)))
	case sessOffer:
		h.offer(q, int(next()))
	case sessFDs:
		kind := next()
		req := vhostuser.ReqSetVringKick + vhostuser.Request(kind>>4%3)
		h.message(req, u64(uint64(q)), h.odd(1, int(kind))...)
	case sessDevice:
		h.device(n, uint64(next()))
	case sessBack:
		h.message(vhostuser.ReqSetBackendReqFD, nil, h.odd(1, 3+3*n+int(next()))...)
	}
}

// hostOffloads are the frames that the guest leaves to be cut.
const hostOffloads = virtio.FNetHostTSO4 | virtio.FNetHostTSO6 | virtio.FNetHostECN | virtio.FNetHostUFO | virtio.FNetHostUSO

// features negotiates: bit 0 of without takes packed rings, the others leave out what they are of a list.
func (h *hostile) features(without byte) {
	f := virtio.FVersion1 | virtio.FProtocolFeatures | virtio.FIndirectDesc | virtio.FEventIdx | virtio.FInOrder | virtio.FNetMrgRxbuf |
		virtio.FNetCsum | hostOffloads | virtio.FNetGuestCsum | virtio.FNetGuestTSO4
	if h.packed = without&1 != 0; h.packed {
		f |= virtio.FRingPacked
	}
	for i, bit := range []virtio.Features{virtio.FIndirectDesc, virtio.FEventIdx, virtio.FInOrder, virtio.FNetMrgRxbuf, virtio.FNetCsum | hostOffloads,
		virtio.FNetGuestCsum | virtio.FNetGuestTSO4, virtio.FProtocolFeatures} {
		if without>>(i+1)&1 != 0 {
			f &^= bit
		}
	}
	h.message(vhostuser.ReqGetFeatures, nil)
	h.message(vhostuser.ReqGetProtocolFeatures, nil)
	p := vhostuser.ProtocolMQ | vhostuser.ProtocolReplyAck | vhostuser.ProtocolConfigureMemSlots | vhostuser.ProtocolBackendReq |
		vhostuser.ProtocolStatus | vhostuser.ProtocolConfig | vhostuser.ProtocolResetDevice
	h.message(vhostuser.ReqSetProtocolFeatures, u64(uint64(p)))
	h.message(vhostuser.ReqSetOwner, nil)
	h.message(vhostuser.ReqSetFeatures, u64(uint64(f)))
}

// region is the payload part that names a region.
func region(i uint64) []byte {
	var b []byte
	for _, v := range []uint64{i * regionSize, regionSize, userBase + i*regionSize, 0} {
		b = append(b, u64(v)...)
	}
	return b
}

// memory hands guest memory over.
func (h *hostile) memory(how int) {
	i := uint64(how & 1)
	switch how >> 1 {
	case 0:
		h.message(vhostuser.ReqSetMemTable, append(u32s(2, 0), append(region(0), region(1)...)...), h.files[0], h.files[1])
	case 1:
		h.message(vhostuser.ReqAddMemReg, append(u64(0), region(i)...), h.files[i])
	case 2:
		h.message(vhostuser.ReqRemMemReg, append(u64(0), region(i)...))
	default:
		h.message(vhostuser.ReqSetMemTable, append(u32s(1, 0), region(i)...), h.files[i])
	}
}

// start starts a queue.
func (h *hostile) start(q uint32) {
	at := userBase + uint64(q)*ringSpace
	base := uint32(0)
	if h.packed {
		base = 0x8000_8000
	}
	h.message(vhostuser.ReqSetVringNum, u32s(q, ringSize))
	h.message(vhostuser.ReqSetVringBase, u32s(q, base))
	addr := u32s(q, 0)
	for _, v := range []uint64{at, at + ringUsed, at + ringAvail, 0} {
		addr = append(addr, u64(v)...)
	}
	h.message(vhostuser.ReqSetVringAddr, addr)
	h.message(vhostuser.ReqSetVringCall, u64(uint64(q)), h.odd(1, 0)...)
	h.message(vhostuser.ReqSetVringKick, u64(uint64(q)), h.odd(1, 0)...)
}

// offer makes n more chains available, and kicks with every eventfd that there is.
func (h *hostile) offer(q uint32, n int) {
	for range min(n, 2*ringSize) {
		if at := h.placed[q]; h.packed {
			phase := uint16(virtio.DescAvail)
			if at/ringSize%2 == 1 {
				phase = virtio.DescUsed
			}
			if q%2 == 0 {
				phase |= virtio.DescWrite
			}
			i := uint64(at % ringSize)
			h.write(0, uint64(q)*ringSpace+i*virtio.DescSize, regionSize+i*bufSize, uint32(bufSize), uint16(i), phase)
		}
		h.placed[q]++
	}
	if !h.packed {
		h.write(0, uint64(q)*ringSpace+ringAvail+2, h.placed[q])
	}
	for _, fd := range h.given {
		_, _ = unix.Write(fd, u64(1))
	}
}

// device says something of the device as a whole.
func (h *hostile) device(what int, v uint64) {
	switch what {
	case 0:
		h.message(vhostuser.ReqResetDevice, nil)
	case 1:
		h.message(vhostuser.ReqSetStatus, u64(v))
	case 2:
		h.message(vhostuser.ReqSendRARP, u64(v))
	case 3:
		h.message(vhostuser.ReqNetSetMTU, u64(v<<4))
	case 4:
		h.message(vhostuser.ReqGetConfig, append(u32s(uint32(v), 12, 0), make([]byte, 12)...))
	case 5:
		h.message(vhostuser.ReqSetConfig, append(u32s(uint32(v), 2, 0), 1, 2))
	case 6:
		h.message(vhostuser.ReqResetOwner, nil)
	case 7:
		h.message(vhostuser.ReqGetStatus, nil)
	case 8:
		h.message(vhostuser.ReqGetMaxMemSlots, nil)
	default:
		h.message(vhostuser.ReqGetQueueNum, nil)
	}
}

// odd are n descriptors, from a kind on.
func (h *hostile) odd(n, kind int) (fds []int) {
	for i := range n {
		fds = append(fds, h.open(kind+i))
	}
	return fds
}

// open makes a descriptor of a kind.
func (h *hostile) open(kind int) int {
	var p [2]int
	var err error
	switch kind & 7 {
	case 0, 1:
		p[0], err = unix.Eventfd(uint(kind&1)*3, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK*(kind>>3&1))
		p[1] = -1
	case 2:
		return h.files[kind>>3&1]
	case 3:
		p, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	case 4:
		err = unix.Pipe2(p[:], unix.O_CLOEXEC)
	case 5:
		if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err == nil {
			p[0], p[1] = p[1], p[0]
		}
	case 6:
		p[0], err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		p[1] = -1
	default:
		p[0], err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
		p[1] = -1
		if err == nil {
			soon := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(time.Microsecond))}
			_ = unix.TimerfdSettime(p[0], 0, &soon, nil)
		}
	}
	if err != nil {
		h.Fatal(err)
	}
	h.given = append(h.given, p[0])
	if p[1] >= 0 {
		h.given = append(h.given, p[1])
	}
	return p[0]
}
