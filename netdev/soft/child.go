package soft

import (
	"fmt"
	"sync"

	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// child is a frame made of another: headers of its own, payload in its parent's pages.
type child struct {
	pool   *pool
	parent *zerocopy.Buffer
	buf    zerocopy.Buffer
	head   [offload.MaxHeaders]byte
	frags  [][]byte
}

// carry makes the child the frame with n bytes of head and this payload. The reference of parent becomes the child's.
func (c *child) carry(parent *zerocopy.Buffer, hdr virtio.NetHdr, n int, payload [][]byte) {
	c.parent = parent
	c.frags = append(append(c.frags[:0], c.head[:n]), payload...)
	u := zerocopy.Ubuf{Callback: released, Arg: c}
	if err := c.buf.RecycleUbuf(u, hdr, c.frags...); err != nil {
		panic("bug: a child in the pool is in use: " + err.Error())
	}
}

// released runs when the inner device is done with a child, on any goroutine.
func released(u *zerocopy.Ubuf, o zerocopy.Outcome) {
	c := u.Arg.(*child)
	parent := c.parent
	c.parent = nil
	if c.buf.Held() {
		c.pool.lose() // orphaned: the Buffer is its holder's for good
	} else {
		c.pool.put(c)
	}
	parent.Release(o)
}

// pool keeps children for reuse. get is the worker's, put anybody's.
type pool struct {
	free []*child // the worker's own

	mu       sync.Mutex
	returned []*child
	made     int // children that are in the pool or on their way
}

func (p *pool) get() *child {
	if len(p.free) == 0 {
		p.mu.Lock()
		p.free, p.returned = p.returned, p.free
		if len(p.free) == 0 {
			p.made++
		}
		p.mu.Unlock()
	}
	n := len(p.free)
	if n == 0 {
		return &child{pool: p}
	}
	c := p.free[n-1]
	p.free = p.free[:n-1]
	return c
}

func (p *pool) put(c *child) {
	p.mu.Lock()
	p.returned = append(p.returned, c)
	p.mu.Unlock()
}

// lose forgets a child that does not come back.
func (p *pool) lose() {
	p.mu.Lock()
	p.made--
	p.mu.Unlock()
}

// out is the number of children that somebody has. No get may run beside it.
func (p *pool) out() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made - len(p.free) - len(p.returned)
}

// heldError says that a device broke its word: "every buffer that it took has been released when Close returns".
type heldError struct{ queue, children int }

func (e *heldError) Error() string {
	return fmt.Sprintf("queue %d: the closed device still holds %d segments", e.queue, e.children)
}
