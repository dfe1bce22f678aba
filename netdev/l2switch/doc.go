// Package l2switch is an Ethernet switch whose ports are guests: what one sends comes to another, or to all, with one copy.
//
// # Theory of operation
//
// A frame from a guest is read (its headers, once, into private memory), judged by its port's rules, put into its VLAN, and looked up:
//
//	Send --> read --> judge --> learn --> look up --> one port, or all of the VLAN
//	                                                     |
//	       guest's posted buffers <-- Door, if free -----+
//	       guest's posted buffers <-- Recv <-- lane <----+-- if not
//
// Frames are delivered on the thread that sends them: it tries the Door of the receiving queue (netdev.Door), and behind it copies the frame from the
// sender's pages into the receiver's posted buffers. So two guests that talk cost one thread, one copy, and no wake-up. If another thread works on that queue, or its
// guest has posted too little, frames wait in the lane, a bounded ring: with their pages, for the moment.
//
// Nobody waits for anybody: a Door is tried and not waited for, a lane that is full drops, and neither is tried while another is held.
//
// # A slow receiver
//
// Pages in a lane belong to the sending guest, who cannot send for ever without them. A sweep, which runs only while pages wait, copies what has waited for
// Config.Hold and gives the pages back. From then on, until the lane has run empty, what comes is copied at once. Copies are bounded in frames and bytes; what
// is beyond is dropped and counted. A sender has no more frames in a lane than there is room left, so others find room beside one that floods.
//
// # Order
//
// Frames of one transmitq to one port all take the same lane, and what is in it goes first. So the frames of a flow, which a guest sends on one queue at a
// time, arrive in order.
//
// # Addresses
//
// The table of learned addresses is read without a lock. Its size is bounded, and so is what one port may put in: a guest that invents addresses finds
// that they are not learned, and takes nothing from others but by chance, where a bucket is full (see victim). An address of a port's Guard is that port's alone.
package l2switch
