// Package udp carries a guest's Ethernet frames in UDP datagrams: VXLAN (RFC 7348), Geneve (RFC 8926), or plain, as QEMU's dgram netdev
// speaks it.
//
// # Theory of operation
//
//	Send:  [tunnel header][guest page][guest page]...  --SENDMSG_ZC-->    skb whose fragments are the guest's pages  --Notif------->  Release
//	       [tunnel header][guest page][guest page]...  --MSG_ZEROCOPY-->  skb whose fragments are the guest's pages  --error queue->  Release
//	       [tunnel header][guest page][guest page]...  --sendmmsg------>  skb (the kernel copies)                                     Release
//	Recv:  skb  --recvmmsg-->  private memory  --Posted.Write-->  guest's buffers
//
// Transmission is zero-copy where that pays: the kernel takes hold of the guest's pages, transiently (nothing is registered, unless with
// Options.NoBalloon: see registered; so a page that the guest's memory loses under a frame is never sent stale), and tells us when the last reference is gone and whether the
// pages were copied on the way. A frame is copied instead, and its Outcome says so, when it is shorter than Options.ZeroCopyMin
// (CopiedSmall), when Options.ZeroCopyPending others are in flight (CopiedCap), when it goes to several peers, has too many
// pages for one datagram, or when the kernel copied too many of those before (CopiedFallback; see throttle), and always where the kernel has neither engine
// (Copied). Copied or not, frames of one flow leave through one socket in the order in which Send got them.
//
// # Engines
//
// Options.Engine is how the kernel is asked to send pages; without a wish, io_uring where it is to be had (Linux 6.3, not forbidden), else MSG_ZEROCOPY
// (Linux 5.0). What flights need of either is the interface engine. MSG_ZEROCOPY costs more for each frame, so its least size is larger, and has
// traits that errorQueueEngine takes care of:
//
//   - The kernel numbers the sends of each socket and reports ranges of numbers through the socket's error queue. It also numbers a send that it
//     refuses late (a firewall), so after every refusal that queue is read before the next send is given a number.
//   - net.core.optmem_max bounds the sends in flight on a socket (157 by default), and RLIMIT_MEMLOCK those of a user without CAP_IPC_LOCK. A frame that
//     meets either is sent with a copy at once, in its turn (CopiedCap, FlightStats.Limited).
//   - The kernel puts reports together without regard to whether they say copied: what it says of a range is true of its first frame.
//   - A socket with reports to read polls as in error, whatever one polls it for. Of dgram's one socket the receiveq's worker therefore reads them too.
//   - Reports end with the socket: a duplicate of its descriptor lives until the last frame in flight is done, and with it, for dgram, the address.
//
// Frames on the way to the network that are longer than the path's MTU are cut by the kernel's IP, which copies them.
//
// # Who hears of completions
//
// The transmitq's worker reaps in its turns, for the price of a load, and polls the engine's descriptor while it sleeps (netdev.Completer): the
// io_uring's, or that of an epoll of the sockets. A worker that has ended does not: so as long as frames are in flight a goroutine (flights.watch)
// looks every longNap whether anybody called Send or Reap, and takes the completions itself where nobody did. Its releases wake the worker
// through the Window. With nothing in flight it is parked and costs nothing.
//
// # Close
//
// Close waits up to Options.Drain for what is in flight. What the kernel still holds then (in a queueing discipline, or in the socket of a reader
// that does not read) stays pinned: Close reports how many frames, and the goroutine stays to release them when the kernel lets go.
//
// # Forwarding
//
// A frame goes to the peer behind which its destination address was last seen as a source (table), else to all peers of the
// configuration: each host gets a datagram of its own (head-end replication), each multicast group one for all its members. A group is joined, too, at
// the interface Options.Dev, or that of Options.Local; the receiving socket is then bound to no address, as one for a group must be, and takes what
// comes for any of the host's. Who is in a group need not be known: peers are learnt from what they send.
//
// Sockets are bound to one port each and every flow keeps to one of them, so that the network between sees as many
// flows as Options.Ports allows (RFC 7348 §5: source port by inner flow). What is decided about a frame is decided on a copy of its first bytes.
//
// Anybody who can send datagrams here can make up addresses. The table takes a bounded number of them, from one peer, from peers that the
// configuration does not name, and in all; beyond that a new address is not learnt, and frames for it go to all peers. Nothing that is in use is driven
// out. But that an address moves to whoever sent it last is how a network learns: a tunnel belongs on a network where nobody lies about it.
//
// # Options
//
// ParseOptions reads KEY=VALUE pairs; netdev/udp/options.go has what each may be.
//
//	vni=N                     the number of the network (vxlan, geneve)
//	local=ADDR[:PORT]         to send from and receive at; any address, and the port assigned to the mode
//	remote=ADDR[:PORT][;...]  peers: hosts, or multicast groups (vxlan, geneve)
//	port=N                    the port that local= and remote= have where they say none
//	dev=NAME                  the interface that the sockets are bound to, and at which groups are joined
//	mtu=BYTES                 of the guest; what the narrowest way to a peer or group leaves
//	ttl=HOPS                  of the datagrams; the host's default, and 1 to groups
//	gso=on|off                whether frames of one length to one peer leave the io_uring as one send, to be cut by the card or the kernel; on
//	learning=on|off           whether peers are learnt from what they send; on
//	ports=N                   source ports that flows are spread over; 8
//	zerocopy=auto|on|off      whether frames leave from the guest's pages; auto
//	zerocopy-min=BYTES        from which length on, with auto; 4096, 3072 in registered memory, 8192 with msg_zerocopy
//	zerocopy-pending=N        frames in the kernel's hands at most; 256
//	zerocopy-engine=auto|io_uring|msg_zerocopy
//	                          how, see above; meant for tests and for finding faults
//	no-balloon=on|off         whether nobody takes pages away from the guest, so that its memory may be registered; off
package udp
