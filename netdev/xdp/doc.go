// Package xdp attaches a guest to an interface of the host's through AF_XDP: an XDP program takes frames out of the driver before the kernel's
// network stack sees them, and frames of the guest's go to the driver directly.
//
// # Theory of operation
//
//	interface's queue  --XDP program--> Rx ring  --> Posted.Write or, in place, Posted.UseLent --> guest
//	interface's queue  <--------------- Tx ring  <-- Buffer
//	                                    Done ring --> Buffer.Release
//
// There is one port, with a socket, for each queue of the interface, and as many queue pairs (the ports of pairs that are not in use are received
// from by those that are). What a socket sends from and receives into is one piece of memory that is registered with it, the arena:
//
//	[chunks to receive into][slots to send from][pad][guest's regions, mapped a second time]...
//
// Without Options.NoBalloon the guest's regions are left out, and each frame is copied, once, into a slot or out of a chunk: registered memory goes on to be
// the pages that it was when the VMM takes pages away from the guest (a balloon), so it is registered only for a user who says that there is none.
//
// With it, a frame that is sent is described where it lies. A piece in private memory comes first where the guest's own first one is too short for an
// Ethernet header (the kernel takes it for granted that it is not) or a checksum is left to the kernel. Whether the kernel copies on from there is the
// driver's matter: a socket that is bound zero-copy has the card read the guest's pages, any other has the kernel read them, once. In both cases
// they are released when the kernel reports the frame as sent.
//
// A change of the guest's memory is a new socket over a new arena; so is Recall. A socket that is closed leaves nothing behind: the kernel reads and writes
// none of the memory any more when Close returns. The interface's queue, though, is free only some time later, so that a socket may have to be
// opened again in the background (port.tend), without one the port takes no frames and has none.
//
// # Receiving in place
//
// With NoBalloon, in copy mode, and frames that fit a chunk, the kernel is told to write into the guest's posted buffers: they are lent to the device in
// order (Posted.Lend), and the kernel uses the addresses it is given in order. The kernel never writes more than the longest frame behind an
// address, which is what the socket's headroom is chosen for; the XDP program has dropped longer frames before. A buffer that has no room for that, or not
// in one piece, is lent all the same, with a chunk of private memory standing in for it at the kernel's: the frame is copied when it comes. When
// the guest has posted few buffers, chunks are added without a buffer, so that a burst has room. The first queue pair to have several ports stops lending.
//
// Before the ring stops or memory changes, everything lent is taken back by closing the socket (Recall): there is no other way to have the kernel forget
// an address.
//
// # Who does what
//
// Each half of a port is guarded by a mutex, which its worker takes for a batch; a goroutine (port.tend) sees to frames in flight when the transmitq's worker
// does not: it reaps, tries again what a busy driver or an interface that is down refused, and reopens. A binding (socket, arena and what hangs on them)
// is closed with both halves locked. If chains were lent by it, the receiveq's worker notices in its next turn, and has them back. When the interface is
// gone, which the kernel says to a kick, Send drops what comes.
//
// # What the kernel does not do for it
//
// XDP sees frames as the driver has them. On a veth these come from the peer's stack with checksums that are left to be completed, and as super-frames:
// switch that off at the peer (ethtool -K PEER tx off, which takes tso and gso along). A card has to have receive offloads off that merge frames (ethtool -K DEV
// lro off; with mode=generic also gro off): a frame longer than the MTU is dropped, and counted. A VLAN tag that the card takes off is lost (ethtool -K DEV rxvlan off).
package xdp
