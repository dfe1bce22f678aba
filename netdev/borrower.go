package netdev

import "github.com/vhostd/vhostd/zerocopy"

// Borrower is a Queue that has the kernel write into posted buffers after Recv has returned (zerocopy.Posted.Lend). Recall is called from the receiveq's side
// before its ring stops or its memory changes: when it returns nobody writes into the guest's buffers any more, frames that had come are on
// the ring, and nothing of p is lent. p is nil when guest memory has faulted and is not to be touched.
type Borrower interface{ Recall(p *zerocopy.Posted) }
