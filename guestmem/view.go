package guestmem

// DirtyLog is told of every write to guest memory while the front-end logs them for live migration (VHOST_F_LOG_ALL). It may be
// called from several queues at once.
type DirtyLog interface {
	// Dirty says that n bytes from a were written. It is told after the write: a page that is copied between the two would go
	// without it, and be clean.
	Dirty(a GPA, n uint64)
}

// View is one queue's way into a Table: it translates, remembering the region of the last hit. It is not safe for concurrent use;
// a slice that it returns is good for as long as the table is pinned.
type View struct {
	last  []byte // memory of the region that was hit last
	base  GPA    // its first guest address
	table *Table
	log   DirtyLog
}

// NewView returns a View of t. The caller keeps t pinned for as long as it uses the View or slices from it.
func NewView(t *Table, log DirtyLog) View {
	return View{table: t, log: log}
}

// Table is the table that v looks into.
func (v *View) Table() *Table { return v.table }

// Hit returns the n bytes at a if they lie in the region of the last hit, else nil: try Slice then. It is small enough to be inlined.
func (v *View) Hit(a GPA, n uint32) []byte {
	off := uint64(a - v.base)
	if end := off + uint64(n); end >= off && end <= uint64(len(v.last)) {
		return v.last[off:end:end]
	}
	return nil
}

// Slice returns the n bytes at a, or nil when they do not lie within one region. For n = 0 the result is nil too.
func (v *View) Slice(a GPA, n uint32) []byte {
	if n == 0 {
		return nil
	}
	if b := v.Hit(a, n); b != nil {
		return b
	}
	r := v.table.find(a)
	if r == nil {
		return nil
	}
	v.last, v.base = r.mem.Bytes, r.Guest
	return v.Hit(a, n)
}

// Prefix returns as many of the n bytes at a as lie within one region, and nil when a is not mapped: guest memory can be
// contiguous for the guest and still lie in two regions, as hot-plugged memory does.
func (v *View) Prefix(a GPA, n uint32) []byte {
	if b := v.Slice(a, n); b != nil || n == 0 {
		return b
	}
	r := v.table.find(a)
	if r == nil {
		return nil
	}
	return r.mem.Bytes[a-r.Guest:]
}

// Logging reports whether writes to guest memory have to be told with Dirty.
func (v *View) Logging() bool { return v.log != nil }

// Dirty tells the dirty log, if there is one, of a write that was done. Every write to guest memory, rings included, is told.
func (v *View) Dirty(a GPA, n uint64) {
	if v.log != nil {
		v.log.Dirty(a, n)
	}
}
