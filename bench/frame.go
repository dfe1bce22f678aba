package bench

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"
)

// A frame is Ethernet with the EtherType for experiments (IEEE 802, 0x88b5), so that no host on the way takes it for anything else:
//
//	0    destination and source, both locally administered
//	12   EtherType
//	14   number, from 0
//	22   when it was sent, or due: nanoseconds since the run began
//	30   length of the frame
//	34   tag of this run: what a back-end still had of another one is not taken for ours
//	38   CRC-32C of all bytes from 14 on, this field being 0; only with Verify
//	42   bytes that depend on the number, with Verify; else on nothing
//
// A back-end that swaps the addresses does no harm.
const (
	offType   = 12
	offNumber = 14
	offStamp  = 22
	offLength = 30
	offTag    = 34
	offSum    = 38
	offBody   = 42
)

var addresses = [14]byte{2, 'v', 'h', 'o', 's', 2, 2, 'v', 'h', 'o', 's', 1, 0x88, 0xb5}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// writeHead writes what differs from frame to frame.
func writeHead(f []byte, tag uint32, number uint64, stamp time.Duration) {
	copy(f[:len(addresses)], addresses[:])
	head := f[offNumber:offBody:offBody]
	binary.LittleEndian.PutUint64(head[0:], number)
	binary.LittleEndian.PutUint64(head[offStamp-offNumber:], uint64(stamp))
	binary.LittleEndian.PutUint32(head[offLength-offNumber:], uint32(len(f)))
	binary.LittleEndian.PutUint32(head[offTag-offNumber:], tag)
}

// writeBody writes all the rest, and the checksum. It comes after writeHead.
func writeBody(f []byte, number uint64) {
	x := number*0x9e3779b97f4a7c15 + 1
	body := f[offBody:]
	for ; len(body) >= 8; body = body[8:] {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(body, x)
	}
	for i := range body {
		body[i] = byte(x >> (8 * i))
	}
	binary.LittleEndian.PutUint32(f[offSum:], 0)
	binary.LittleEndian.PutUint32(f[offSum:], crc32.Checksum(f[offNumber:], castagnoli))
}

// tagged tells a frame of the run with this tag from others, by its head.
func tagged(f []byte, tag uint32) bool {
	return len(f) >= offBody && f[offType] == addresses[offType] && f[offType+1] == addresses[offType+1] &&
		binary.LittleEndian.Uint32(f[offTag:]) == tag
}

func numberOf(f []byte) uint64 { return binary.LittleEndian.Uint64(f[offNumber:]) }

func stampOf(f []byte) time.Duration { return time.Duration(binary.LittleEndian.Uint64(f[offStamp:])) }

// checkFrame says what is wrong with a frame that writeBody wrote. It overwrites the checksum.
func checkFrame(f []byte) error {
	if n := binary.LittleEndian.Uint32(f[offLength:]); int(n) != len(f) {
		return fmt.Errorf("frame %d came back with %d bytes, was sent with %d", numberOf(f), len(f), n)
	}
	sum := binary.LittleEndian.Uint32(f[offSum:])
	binary.LittleEndian.PutUint32(f[offSum:], 0)
	if got := crc32.Checksum(f[offNumber:], castagnoli); got != sum {
		return fmt.Errorf("frame %d of %d bytes came back changed: checksum %#08x, was sent with %#08x", numberOf(f), len(f), got, sum)
	}
	return nil
}
