// Package user is a user-mode network: the guest sits behind a router that lives in this process, and reaches the world through
// ordinary sockets of the host. No privilege, interface or address of the host is needed. Its face to the guest is that of QEMU's
// "-netdev user": network 10.0.2.0/24, router 10.0.2.2, name server 10.0.2.3, a guest at 10.0.2.15, and fd00::/64 beside it.
//
// # Theory of operation
//
//	 guest                                this process                                         host
//	transmitq --Send--> ingress --> netstack --> TCP, UDP and ping flows --> sockets ------> anywhere
//	                       |           |  ^                                     |
//	                       |           |  +---------- DNS server --------------(+--> resolv.conf's servers)
//	                       +- DHCP, router advertisements
//	                       |           |
//	receiveq <--Recv-- outbox <--------+
//
// ingress looks at each frame once, in private memory: what is not for the router goes no further, what a router answers by itself (DHCP,
// router solicitations) is answered there, and all else is given to gVisor's network stack, which takes every destination address
// for its own. So a connection of the guest to any address ends in the stack, and a flow carries its bytes on over a socket of the
// host. A handshake is completed only when the host's socket is connected: what is refused or unreachable for the host is so for the
// guest. An address that the guest uses for the router (Options.Host) stands for the host's loopback; the loopback has no other.
//
// # Frames
//
// Checksums and segmentation are left undone in both directions as far as virtio-net allows (virtio-v1.2 §5.1.6.2, §5.1.6.4): the
// guest's large segments reach the stack as one packet, with the checksum taken as verified where the guest left it partial; frames
// with a full checksum are verified. The stack's own segments of up to 64 KiB leave uncut, and zerocopy.Posted cuts them for a
// driver that cannot take them.
//
// # Goroutines, locks and bounds
//
// Send runs on the transmitq's worker: frames are copied, and the stack queues TCP segments for goroutines of its own. Datagrams are
// written to non-blocking sockets at once, or dropped. Nothing on that path waits. What the stack sends is put into a bounded outbox per
// queue pair, chosen by a hash of the flow; a full outbox drops, and TCP's own windows make that rare. The worker of the receiveq is
// woken by an eventfd only when its last Recv was idle.
//
// Everything a guest can make the process keep is bounded: connections, flows, leases, frames, fragments (see the constants beside
// each table). Beyond a bound, connections are reset and the longest idle datagram flow makes room. The guest can reach
// whatever the user who runs the process can reach, except the host's loopback (but for Options.Host), multicast and broadcast. That
// includes link-local services such as a cloud's metadata server, as it does behind any NAT; Options.Restrict leaves only what
// is forwarded.
package user
