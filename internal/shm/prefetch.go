package shm

// PrefetchWrite asks for the cache lines of b's memory, for writing. Nothing else comes of it: no fault, no store, nothing to order. A store to a line that the
// other side's processor has takes a trip there and back, and stores wait in line for each other; asked for together beforehand, the
// lines travel at the same time.
func PrefetchWrite(b []byte) {
	if len(b) > 0 {
		prefetchWrite(&b[0], len(b))
	}
}

//go:noescape
func prefetchWrite(p *byte, n int)

// PrefetchRead asks for the cache lines of b's memory, for reading.
func PrefetchRead(b []byte) {
	if len(b) > 0 {
		prefetchRead(&b[0], len(b))
	}
}

//go:noescape
func prefetchRead(p *byte, n int)
