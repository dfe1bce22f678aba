package l2switch

import (
	"sync"

	"github.com/vhostd/vhostd/virtio"
)

// Sizes in bytes of the private memory for frames that wait.
const (
	smallMem = 2048
	largeMem = virtio.MaxFrame + tagLen
)

type (
	small [smallMem]byte
	large [largeMem]byte
)

// The memory of frames that have gone is used again by those that come, of all switches.
var (
	smalls = sync.Pool{New: func() any { return new(small) }}
	larges = sync.Pool{New: func() any { return new(large) }}
)

// memory returns n bytes.
func memory(n int) []byte {
	if n <= smallMem {
		return smalls.Get().(*small)[:0]
	}
	return larges.Get().(*large)[:0]
}

// freeMemory takes back what memory has returned.
func freeMemory(b []byte) {
	switch cap(b) {
	case smallMem:
		smalls.Put((*small)(b[:smallMem]))
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
