// Package packet attaches a guest to an interface of the host that is there already, a network card say, through AF_PACKET sockets: one per
// queue pair, with rings that the kernel shares, and a virtio-net header in front of frames, so that checksums and segmentation pass
// through to whoever does them best.
//
// # Theory of operation
//
//	Send:  guest pages --copy--> [slot][slot][slot]...  --one sendto per batch-->  skb whose data are the slots, to the driver
//	Recv:  skb --kernel's copy--> [slot][slot][slot]... --copy--> the guest's posted buffers
//	       skb of a large frame   --readv-------------------------> the guest's posted buffers
//
// It copies every frame in both directions: a packet socket has no zero-copy for memory other than its own rings (it refuses
// SO_ZEROCOPY, and ignores MSG_ZEROCOPY). What the rings save is system calls.
//
// A slot belongs to the kernel or to vhostd; its first word says to which, and is loaded before anything else in the slot is read, stored
// after everything else was written:
//
//	transmit: AVAILABLE (ours) -> SEND_REQUEST (the kernel's to look at) -> SENDING -> AVAILABLE
//	receive:  KERNEL -> USER (ours) -> KERNEL
//
// The rings are TPACKET_V2's, for both directions. V3 packs frames of all sizes into blocks, and hands a block over when it is full or a
// timer of at least one millisecond has run out: a frame that comes alone waited 1.4 ms for that here, beside 20 us with V2, and
// most frames of a request and its answer come alone.
//
// # Large frames
//
// Slots for sending hold the largest frame that a guest may send, and are few. Slots for receiving hold a frame of the interface's MTU,
// and are many: a longer one, put together by the sender or by GRO, only has its beginning there (TP_STATUS_COPY), and waits
// whole in the socket's queue, from where it is read into the guest's buffers by one readv, without the detour through the ring. Both
// happen under one lock in the kernel, so the order of slots is the order of that queue.
//
// # What becomes of a frame
//
// A frame that the kernel refuses (WRONG_FORMAT, or the error of sendto), that is longer than the MTU without segmentation, or that fits no
// slot is dropped and counted. The kernel stays at the slot of a refused frame until it is sent (PACKET_LOSS would skip it, and tell
// nobody), so the frames behind it move up by one. With no room in the socket's buffer (EAGAIN) what is in the slots stays there (Held).
//
// VLAN tags that the kernel took out of received frames are put back. Frames that leave the host through the interface, the guest's own
// among them, are not received (PACKET_IGNORE_OUTGOING).
//
// # The interface
//
// It stays the host's: the host's own stack receives every frame as well, and answers those for its own addresses. A guest should have it
// for itself, without addresses of the host's. The guest and the host do not reach each other through it.
//
// While it is down, frames are dropped and none come; the sockets work again by themselves when it is up. RecvFD is then a netlink socket's:
// the packet socket's would be ready all the time, for its error. When the interface is gone, Recv says so.
package packet
