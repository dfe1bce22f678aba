package udp

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/sys/uring"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// registered is guest memory that the io_uring knows, so that it need not look up the pages of every frame. All pieces of a frame must lie in
// one registered buffer, which is 1 GiB at most. So guest memory is in chunks of somewhat less, each mapped a second time behind private memory for
// what comes before the pages:
//
//	[tunnel header, a page][first bytes of the frame in slot 0][... slot 1] ... [guest memory]
//
// A frame whose last bytes lie in a chunk and whose first do not, as a header apart from its payload may, has those copied into its slot's page.
type registered struct {
	chunks []*shm.Arena
	tunnel int // bytes of the tunnel header
	slots  int // that have a page
	last   int // chunk that was found last
}

const (
	// maxSlotPages bounds the memory that is pinned for frames' first bytes, to one thousandth of the guest's.
	maxSlotPages = 256
	hugePage     = 2 << 20
	// chunkRoom is what a chunk has for guest memory: private memory and the rounding of its last piece come on top.
	chunkRoom = uring.MaxBuffer - 2*hugePage
)

// newRegistered maps guest memory for registration.
func newRegistered(regions [][]byte, tunnel []byte, pending int) (*registered, error) {
	r := &registered{tunnel: len(tunnel), slots: min(pending, maxSlotPages)}
	for _, pieces := range cut(regions) {
		a, err := shm.NewArena((1+r.slots)*sys.PageSize, pieces...)
		if err != nil {
			return nil, errors.Join(err, r.close())
		}
		r.chunks = append(r.chunks, a)
		if n := len(a.Bytes()); n > uring.MaxBuffer {
			return nil, errors.Join(fmt.Errorf("%#x bytes of memory in one piece, at most %#x: its pages are too large", n, uring.MaxBuffer), r.close())
		}
		copy(a.Private(), tunnel)
	}
	return r, nil
}

// cut divides guest memory into chunks, at borders of the smaller kind of huge pages.
func cut(regions [][]byte) (chunks [][][]byte) {
	room := 0
	for _, rest := range regions {
		for len(rest) > 0 {
			skew := int(shm.Addr(rest) % hugePage)
			if room < skew+hugePage {
				chunks, room = append(chunks, nil), chunkRoom
			}
			n := min(len(rest), room-skew)
			if n < len(rest) {
				n -= (skew + n) % hugePage
			}
			c := &chunks[len(chunks)-1]
			*c = append(*c, rest[:n:n])
			room -= (skew + n + hugePage - 1) / hugePage * hugePage
			rest = rest[n:]
		}
	}
	return chunks
}

func (r *registered) buffers() (list [][]byte) {
	for _, a := range r.chunks {
		list = append(list, a.Bytes())
	}
	return list
}

func (r *registered) close() error {
	var errs []error
	for _, a := range r.chunks {
		errs = append(errs, a.Close())
	}
	r.chunks = nil
	return errors.Join(errs...)
}

// find looks for the chunk of b's last bytes, and counts the bytes before the first from which on all lie there: these have to be pulled.
func (r *registered) find(b *zerocopy.Buffer) (chunk, before int, ok bool) {
	segs := b.Segs()
	i := len(segs) - 1
	if chunk, ok = r.chunk(segs[i].Mem); !ok {
		return 0, 0, false
	}
	for i--; i >= 0; i-- {
		if _, in := r.chunks[chunk].Offset(segs[i].Mem); !in {
			break
		}
	}
	for ; i >= 0; i-- {
		before += len(segs[i].Mem)
	}
	return chunk, before, before <= sys.PageSize-r.tunnel
}

func (r *registered) chunk(mem []byte) (int, bool) {
	if _, ok := r.chunks[r.last].Offset(mem); ok {
		return r.last, true
	}
	for i, a := range r.chunks {
		if _, ok := a.Offset(mem); ok {
			r.last = i
			return i, true
		}
	}
	return 0, false
}

// header is the tunnel header in a chunk.
func (r *registered) header(chunk int) []byte { return r.chunks[chunk].Private()[:r.tunnel] }

// page is the private memory of a slot in a chunk, or nil for one that has none.
func (r *registered) page(chunk, slot int) []byte {
	if slot >= r.slots {
		return nil
	}
	off := (1 + slot) * sys.PageSize
	return r.chunks[chunk].Private()[off : off+sys.PageSize]
}

// again is mem, which lies in a chunk, as it is registered.
func (r *registered) again(chunk int, mem []byte) []byte {
	off, ok := r.chunks[chunk].Offset(mem)
	if !ok {
		panic(fmt.Sprintf("bug: %d bytes of a frame are not in chunk %d of registered memory", len(mem), chunk))
	}
	return r.chunks[chunk].Bytes()[off : off+uint64(len(mem))]
}

var _ netdev.Registrar = (*Device)(nil)

// SetMemory implements netdev.Registrar. Nothing is registered unless Options.NoBalloon. Frames in flight from registered memory are waited for as
// Close waits; the pages of those that the kernel still holds then stay as they are until it lets go, whatever becomes of the mapping.
func (d *Device) SetMemory(regions [][]byte) error {
	s := &d.queue.send
	if !d.opts.NoBalloon || s.flights == nil {
		return nil
	}
	e, ok := s.flights.engine.(*ringEngine)
	if !ok || !e.ring.VectoredFixed() {
		if len(regions) == 0 {
			return nil
		}
		return fmt.Errorf("%s: no-balloon: guest memory can be registered with the io_uring of Linux 6.15 or newer, and is not here", d)
	}
	if err := d.unregister(e); err != nil || len(regions) == 0 {
		return err
	}
	r, err := newRegistered(regions, s.tunnel, d.opts.ZeroCopyPending)
	if err != nil {
		return fmt.Errorf("%s: guest memory for io_uring: %w", d, err)
	}
	if err := e.ring.SetBuffers(r.buffers()); err != nil {
		return fmt.Errorf("%s: guest memory for io_uring: %w%s", d, errors.Join(err, r.close()), explainLocked(err))
	}
	s.registered, s.minRegistered = r, d.opts.least(DefaultRegisteredMin)
	return nil
}

// unregister forgets what was registered.
func (d *Device) unregister(e *ringEngine) error {
	s := &d.queue.send
	r := s.registered
	if r == nil {
		return nil
	}
	s.flights.settle(d.opts.Drain)
	s.registered = nil
	return errors.Join(e.ring.SetBuffers(nil), r.close())
}

// settle waits until no frame is in flight from registered memory, up to d.
func (f *flights) settle(d time.Duration) {
	for deadline := time.Now().Add(d); f.registered() > 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
}

func (f *flights) registered() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.slots {
		if f.slots[i].buf != nil && f.slots[i].registered {
			n++
		}
	}
	return n
}

// explainLocked says what to do where the limit on locked memory is in the way.
func explainLocked(err error) string {
	var limit unix.Rlimit
	if !errors.Is(err, unix.ENOMEM) || unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) != nil || limit.Cur == unix.RLIM_INFINITY {
		return ""
	}
	return fmt.Sprintf(" (the limit on locked memory is %d bytes: raise it, with ulimit -l or LimitMEMLOCK=, or grant CAP_IPC_LOCK)", limit.Cur)
}
