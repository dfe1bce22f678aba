// Package udp carries a guest's Ethernet frames in UDP datagrams: VXLAN (RFC 7348), Geneve (RFC 8926), or plain, as QEMU's dgram netdev
// speaks it.
//
// # Theory of operation
//
//	Send:  [tunnel header][guest page][guest page]...  --SENDMSG_ZC-->  skb whose fragments are the guest's pages  --Notif-->  Release
//	       [tunnel header][guest page][guest page]...  --sendmmsg---->  skb (the kernel copies)                               Release
//	Recv:  skb  --recvmmsg-->  private memory  --Posted.Write-->  guest's buffers
//
// Transmission is zero-copy where that pays: the kernel takes hold of the guest's pages, transiently (nothing is registered, so a page that
// the guest's memory loses under a frame is never sent stale), and io_uring notifies us when the last reference is gone and whether the
// pages were copied on the way. A frame is copied instead, and its Outcome says so, when it is shorter than Options.ZeroCopyMin
// (CopiedSmall), when Options.ZeroCopyPending others are in flight (CopiedCap), when it goes to several peers, has too many
// pages for one datagram, or when the kernel copied too many of those before (CopiedFallback; see throttle), and always where there is no io_uring
// (Copied). Copied or not, frames of one flow leave through one socket in the order in which Send got them.
//
// Frames on the way to the network that are longer than the path's MTU are cut by the kernel's IP, which copies them.
//
// # Who hears of completions
//
// The transmitq's worker reaps in its turns, for the price of a load. A worker that sleeps, or that has ended, does not: so as long as frames are in
// flight a goroutine (flights.watch) polls the io_uring. Every time that it finds a completion it first leaves the worker watchNap to
// take it, and takes it itself if neither Send nor Reap was called meanwhile. Its releases wake the worker through the Window. With nothing
// in flight it is parked and costs nothing.
//
// # Close
//
// Close waits up to Options.Drain for what is in flight. What the kernel still holds then (in a queueing discipline, or in the socket of a reader
// that does not read) stays pinned: Close reports how many frames, and the goroutine stays to release them when the kernel lets go.
//
// # Forwarding
//
// A frame goes to the peer behind which its destination address was last seen as a source (table), else to all peers of the
// configuration. Sockets are bound to one port each and every flow keeps to one of them, so that the network between sees as many
// flows as Options.Ports allows (RFC 7348 §5: source port by inner flow). What is decided about a frame is decided on a copy of its first bytes.
package udp
