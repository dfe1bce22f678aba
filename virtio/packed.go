package virtio

// Flags of PackedDesc beside those of Desc (virtio-v1.2 §2.8.1). A descriptor is available when DescAvail is the driver's wrap counter and
// DescUsed is not; it is used when both are the device's.
const (
	DescAvail = 1 << 7
	DescUsed  = 1 << 15
)

// PackedDesc is struct pvirtq_desc, 16 bytes, an element of the descriptor ring of a packed virtqueue: the driver makes it available, the
// device makes it used (virtio-v1.2 §2.8.13).
type PackedDesc struct {
	Addr  uint64 // guest-physical address
	Len   uint32 // bytes; of a used descriptor, how many were written, if Flags has DescWrite
	ID    uint16 // of the buffer, in the last descriptor of its chain
	Flags uint16
}

// Flags of an event suppression structure, 4 bytes: le16 offset and wrap counter, le16 flags (virtio-v1.2 §2.8.14). The driver's and the
// device's have one format, and each is read by the other side.
const (
	EventEnable  = 0 // notify
	EventDisable = 1 // do not
	EventDesc    = 2 // notify of the descriptor at an offset; with VIRTIO_F_EVENT_IDX only
)

// EventLen and EventAlign are the size and alignment in bytes of an event suppression structure (virtio-v1.2 §2.8). The descriptor ring has
// those of a split virtqueue's descriptor table: DescTableLen, DescAlign.
const (
	EventLen   = 4
	EventAlign = 4
)
