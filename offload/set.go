// Package offload does in software what one side of a link leaves to the other and the other does not do: completing
// checksums (virtio-v1.2 §5.1.6.2, VIRTIO_NET_F_CSUM) and cutting large frames into segments (TSO, USO, UFO).
//
// # Theory of operation
//
// A frame is lowered by a Segmenter when its receiver's Set does not take its virtio-net header as it is:
//
//	guest pages   [ Ethernet | IP | TCP | payload ............................... ]
//	                  | read once, into private memory
//	Start         [ headers ]            what is decided on, and what is rewritten for each segment
//	Next          [ headers' ] + payload[0:n]     payload: slices of the guest's pages, not copied
//	              [ headers' ] + payload[n:2n]
//
// The bytes come from a guest that may lie in every one of them, and may rewrite them at any moment. So each byte of a header is read
// exactly once, lengths are checked against what is really there, and the number of segments has a bound (MaxSegments). What the guest
// rewrites in the payload in the meantime costs it the checksum of its own frame and nothing else.
//
// A receiver that takes partial checksums (Csum) gets them in segments too: the pseudo-header's sum in the checksum field, which
// spares reading the payload. For others, the checksum is computed over the payload where it lies.
package offload

import "github.com/vhostd/vhostd/virtio"

// Set is a set of offloads that the receiver of a frame handles.
type Set uint8

// The members of a Set.
const (
	Csum Set = 1 << iota // partial checksums
	TSO4
	TSO6
	ECN // TCP segments with ECN, beside TSO4 or TSO6
	UFO
	USO4
	USO6

	All = Csum | TSO4 | TSO6 | ECN | UFO | USO4 | USO6
)

// Has reports whether every member of want is in s.
func (s Set) Has(want Set) bool { return s&want == want }

// Takes reports whether a receiver that handles s can be handed a frame with the header h as it is. A set that has only one of USO4
// and USO6 takes no frame of UDP segments by its header alone, since that does not say which it is: Segmenter.Start looks.
func (s Set) Takes(h virtio.NetHdr) bool {
	return h.Flags|h.GSOType == 0 || s.takes(h.GSOType)
}

// TakesWords is Takes for a header of which first is the first of its Words.
func (s Set) TakesWords(first uint64) bool {
	return !virtio.NetHdrAsks(first) || s.takes(uint8(first>>8))
}

// takes is Takes for a header that asks for something: for that much, partial checksums are the least.
func (s Set) takes(gsoType uint8) bool {
	need := Csum
	switch gsoType &^ virtio.GSOECN {
	case virtio.GSONone:
		return gsoType == virtio.GSONone && s.Has(need)
	case virtio.GSOTCPv4:
		need |= TSO4
	case virtio.GSOTCPv6:
		need |= TSO6
	case virtio.GSOUDP:
		need |= UFO
	case virtio.GSOUDPL4:
		need |= USO4 | USO6
	default:
		return false
	}
	if gsoType&virtio.GSOECN != 0 {
		need |= ECN
	}
	return s.Has(need)
}

type bit struct {
	set  Set
	feat virtio.Features
}

var fromGuest = []bit{
	{Csum, virtio.FNetCsum}, {TSO4, virtio.FNetHostTSO4}, {TSO6, virtio.FNetHostTSO6}, {ECN, virtio.FNetHostECN},
	{UFO, virtio.FNetHostUFO}, {USO4 | USO6, virtio.FNetHostUSO},
}

var toGuest = []bit{
	{Csum, virtio.FNetGuestCsum}, {TSO4, virtio.FNetGuestTSO4}, {TSO6, virtio.FNetGuestTSO6}, {ECN, virtio.FNetGuestECN},
	{UFO, virtio.FNetGuestUFO}, {USO4, virtio.FNetGuestUSO4}, {USO6, virtio.FNetGuestUSO6},
}

// FromGuest are the offloads of the frames that a driver with features f may send.
func FromGuest(f virtio.Features) Set { return pick(fromGuest, f) }

// ToGuest are the offloads of the frames that a driver with features f takes.
func ToGuest(f virtio.Features) Set { return pick(toGuest, f) }

func pick(bits []bit, f virtio.Features) Set {
	var s Set
	for _, b := range bits {
		if f.Has(b.feat) {
			s |= b.set
		}
	}
	return s
}
