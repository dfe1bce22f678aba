package virtio

// MaxQueueSize is the largest queue size of a split virtqueue (virtio-v1.2 §2.7).
const MaxQueueSize = 32768

// Flags of Desc (virtio-v1.2 §2.7.5).
const (
	DescNext     = 1 // the chain goes on at Next
	DescWrite    = 2 // device-writable; else device-readable
	DescIndirect = 4 // the buffer is a table of descriptors
)

// Desc is struct virtq_desc, 16 bytes; the driver writes it, the device only reads it.
type Desc struct {
	Addr  uint64 // guest-physical address
	Len   uint32 // bytes
	Flags uint16
	Next  uint16 // index of the next descriptor, if Flags has DescNext
}

// UsedElem is struct virtq_used_elem, 8 bytes; only the device writes it.
type UsedElem struct {
	ID  uint32 // head of the chain that was used
	Len uint32 // bytes written into its device-writable part
}

// Flag of the available ring: the driver asks for no interrupt (virtio-v1.2 §2.7.6).
const AvailNoInterrupt = 1

// Flag of the used ring: the device asks for no notification (virtio-v1.2 §2.7.8).
const UsedNoNotify = 1

// Sizes and alignments in bytes of the three parts of a split virtqueue (virtio-v1.2 §2.7).
const (
	DescSize   = 16
	DescAlign  = 16
	AvailAlign = 2
	UsedAlign  = 4
)

// DescTableLen, AvailLen and UsedLen are the sizes in bytes of the parts of a queue of size n; AvailLen and UsedLen include the
// event field, which is part of the ring whether VIRTIO_F_EVENT_IDX was negotiated or not.
func DescTableLen(n int) int { return DescSize * n }

// AvailLen: see DescTableLen.
func AvailLen(n int) int { return 6 + 2*n }

// UsedLen: see DescTableLen.
func UsedLen(n int) int { return 6 + 8*n }
