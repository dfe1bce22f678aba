package packet

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
)

// Offsets in struct tpacket2_hdr (include/uapi/linux/if_packet.h), the head of every slot. All values are in the host's byte order.
const (
	offLen      = 4  // 32 bit: bytes of the frame, with the virtio-net header when sending
	offSnapLen  = 8  // 32 bit: bytes of it in the slot
	offMAC      = 12 // 16 bit: offset of the frame in the slot, behind the virtio-net header
	offVLANTCI  = 24 // 16 bit
	offVLANTPID = 26 // 16 bit
	// sendData is where the virtio-net header and the frame begin when sending: behind the head.
	sendData = 32
	// recvHead is the most that lies in front of a received frame: head, address, virtio-net header, alignment.
	recvHead = 128
	// slotAlign is TPACKET_ALIGNMENT, in bytes.
	slotAlign = 16
)

// slot is the place of one frame in a ring.
type slot struct {
	status *uint32
	mem    []byte
}

func (s *slot) load() uint32          { return atomic.LoadUint32(s.status) }
func (s *slot) store(status uint32)   { atomic.StoreUint32(s.status, status) }
func (s *slot) u32(off int) int       { return int(binary.NativeEndian.Uint32(s.mem[off:])) }
func (s *slot) u16(off int) uint16    { return binary.NativeEndian.Uint16(s.mem[off:]) }
func (s *slot) putLen(n int)          { binary.NativeEndian.PutUint32(s.mem[offLen:], uint32(n)) }
func (s *slot) take(from *slot)       { copy(s.mem[offLen:sendData+from.u32(offLen)], from.mem[offLen:]) }
func (s *slot) room(header int) int   { return len(s.mem) - sendData - header }
func (s *slot) is(status uint32) bool { return s.load()&status != 0 }

// shape is the shape of a ring: slots never cross a block.
type shape struct{ slot, block, blocks int }

// shapeOf is that of a ring of at least n slots of at least size bytes.
func shapeOf(n, size, block int) shape {
	size = (size + slotAlign - 1) &^ (slotAlign - 1)
	per := block / size
	return shape{size, block, (n + per - 1) / per}
}

func (s shape) slots() int { return s.block / s.slot * s.blocks }
func (s shape) bytes() int { return s.block * s.blocks }

func (s shape) set(fd, opt int) error {
	return unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, opt, &unix.TpacketReq{
		Block_size: uint32(s.block), Block_nr: uint32(s.blocks), Frame_size: uint32(s.slot), Frame_nr: uint32(s.slots()),
	})
}

// cut returns the slots of a ring in mem.
func (s shape) cut(mem []byte) ([]slot, error) {
	all := make([]slot, 0, s.slots())
	for at := 0; at < s.bytes(); at += s.block {
		for i := range s.block / s.slot {
			m := mem[at+i*s.slot : at+(i+1)*s.slot : at+(i+1)*s.slot]
			w, err := shm.Word(m, 0)
			if err != nil {
				return nil, fmt.Errorf("status of slot %d: %w", len(all), err)
			}
			all = append(all, slot{w, m})
		}
	}
	return all, nil
}
