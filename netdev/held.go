package netdev

import (
	"fmt"
	"time"
)

// HeldError is a Device's answer to Close when the kernel still refers to the pages of frames: it has waited as long as it may, the buffers have not been
// released, and will be when the kernel lets go. Whoever ends its process then loses nothing, since the kernel keeps the pages by itself.
type HeldError struct {
	Frames int
	Waited time.Duration
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("after %v the kernel still refers to the pages of %d frames: they stay pinned", e.Waited, e.Frames)
}
