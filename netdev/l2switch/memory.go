package l2switch

import (
	"sync"

	"github.com/vhostd/vhostd/virtio"
)

// Sizes in bytes of the private memory for frames that wait.
const (
	smallMem  = 2048
	mediumMem = 16 << 10 // jumbo frames
	largeMem  = virtio.MaxFrame + tagLen
)

type (
	small  [smallMem]byte
	medium [mediumMem]byte
	large  [largeMem]byte
)

// The memory of frames that have gone is used again by those that come, of all switches.
var (
	smalls  = sync.Pool{New: func() any { return new(small) }}
	mediums = sync.Pool{New: func() any { return new(medium) }}
	larges  = sync.Pool{New: func() any { return new(large) }}
)

// memory returns n bytes.
func memory(n int) []byte {
	switch {
	case n <= smallMem:
		return smalls.Get().(*small)[:0]
	case n <= mediumMem:
		return mediums.Get().(*medium)[:0]
	}
	return larges.Get().(*large)[:0]
}

// memoryOf is how much memory n bytes take, but for a tag: a guest chooses how long its frames are, and what is bounded is what the host has to find.
func memoryOf(n int) int {
	switch {
	case n == 0:
		return 0 // a frame that was lost
	case n <= smallMem:
		return smallMem
	case n <= mediumMem:
		return mediumMem
	}
	return virtio.MaxFrame
}

// freeMemory takes back what memory has returned.
func freeMemory(b []byte) {
	switch cap(b) {
	case smallMem:
		smalls.Put((*small)(b[:smallMem]))
	case mediumMem:
		mediums.Put((*medium)(b[:mediumMem]))
	case largeMem:
		larges.Put((*large)(b[:largeMem]))
	}
}

// gather appends pieces to b, which has room for them.
func gather(b []byte, frags [][]byte) []byte {
	for _, f := range frags {
		b = append(b, f...)
	}
	return b
}
