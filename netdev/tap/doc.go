// Package tap attaches a guest to a tap or macvtap interface of the host's kernel: one descriptor per queue pair, frames with a
// virtio-net header in front, so that checksums and segmentation pass through to whoever does them best.
//
// # Theory of operation
//
//	Send:  [private header][guest page][guest page]...  --writev-->  skb (the kernel copies: a tap has no zero-copy for user space)
//	       a few frames or more, each as above  --io_uring, one system call-->  skb, skb, skb
//	Recv:  skb  --readv-->  [private header][guest's posted buffers...][rest of the stage]
//
// The descriptors are non-blocking and stay away from Go's poller; who waits polls SendFD and RecvFD.
//
// Sending: a frame is done when its write returns, so all are released together at the end of the batch. A full send buffer (EAGAIN) ends
// the batch; any other error is that frame's end, and counts.
//
// A batch of batchLeast frames or more goes to the kernel in one system call, as writes through an io_uring (batcher): what is saved is the way
// into the kernel and out. The kernel carries them out there and then, in order, and what became of each is known when the call
// returns. Only: it goes on with the next write after one that was refused. Of most errors that is what we want; after an EAGAIN the next
// ones may find the room that the refused one did not, and overtake it. A chain of requests (IOSQE_IO_LINK) would stop there, and costs most
// of what the batch gains. So batches are for a send buffer without a bound, which is every tap's unless somebody set one
// (TUNSETSNDBUF), and never refuses; a macvtap's has a bound. Should it get one later, then a frame that was overtaken is dropped, as a wire drops
// and never reorders, and from that refusal on frames are written one by one. They are as well where io_uring is missing or forbidden, and
// after it failed.
//
// Guest memory is not registered with the ring: measured, that saves some 2 % of a small frame, makes a large one out of cold memory a tenth to
// a third dearer, and would pin all of the guest's memory (docs/perf/2026-11-22-tap.md).
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
