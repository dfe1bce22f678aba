package shm

// wideFrom is the length in bytes from which Copy is worth a call of its own; below, the built-in copy is as fast.
const wideFrom = 512

// Copy is the built-in copy of src to the start of dst, which has to be as long: for frames on their way into memory that another processor has used.
// There the stores bound the rate, and a store of a whole cache line takes the place of two. dst and src do not overlap.
func Copy(dst, src []byte) {
	if len(src) < wideFrom || !wide {
		copy(dst[:len(src)], src)
		return
	}
	copyWide(dst[:len(src)], src)
}
