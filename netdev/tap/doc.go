// Package tap attaches a guest to a tap or macvtap interface of the host's kernel: one descriptor per queue pair, frames with a
// virtio-net header in front, so that checksums and segmentation pass through to whoever does them best.
//
// # Theory of operation
//
//	Send:  [private header][guest page][guest page]...  --writev-->  skb (the kernel copies: a tap has no zero-copy for user space)
//	Recv:  skb  --readv-->  [private header][guest's posted buffers...][rest of the stage]
//
// The descriptors are non-blocking and stay away from Go's poller; who waits polls SendFD and RecvFD.
//
// Sending: a frame is done when writev returns, so all are released together at the end of the batch. A full socket buffer (EAGAIN) ends
// the batch; any other error is that frame's end, and counts.
//
// Receiving: nothing tells beforehand how long the next frame is, and a read that is too short truncates it silently. So every read
// ends in a private buffer, the stage: room for what the posted buffers cannot take. A frame that fits the posted buffers is where
// it belongs without another copy. One that does not is put together in the stage and written from there, and waits there when the
// guest has to post more first: no frame that was read is lost, whatever the MTU became in the meantime. How many posted buffers
// are offered to a read follows the size of the frames seen lately, because each costs time.
//
// The header goes to private memory first, is decided on there, and reaches the guest as a copy: a frame that needs an offload that the
// guest does not take (queued in the kernel before SetOffloads) is lowered in software by Posted.Write.
//
// # Queues
//
// SetPairs detaches the queues beyond the ones in use, so that the kernel steers no flow to them; queue 0 always stays attached.
// A detached queue must not be used. The kernel numbers attached queues in the order in which they were attached, which is why they
// are detached from the last and attached from the first.
package tap
