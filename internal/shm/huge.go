package shm

import (
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// hugeFile is a mapping of a hugetlb file, of which the kernel makes no second one without the file: so its descriptor is kept, of these
// files alone.
type hugeFile struct {
	start, end uintptr // of the mapping
	off        uint64  // of start in the file
	page       uintptr // bytes
	fd         int
}

var huge struct {
	sync.Mutex
	files []*hugeFile
}

// keepHuge notes a mapping of fd from off on, if that is a hugetlb file; else it returns nil.
func keepHuge(fd int, mapped []byte, off uint64, page uintptr) (*hugeFile, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || uint32(st.Type) != unix.HUGETLBFS_MAGIC {
		return nil, nil
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("keeping the descriptor of a hugetlb file: %w", err)
	}
	h := &hugeFile{start: Addr(mapped), end: Addr(mapped) + uintptr(len(mapped)), off: off, page: page, fd: own}
	huge.Lock()
	defer huge.Unlock()
	huge.files = append(huge.files, h)
	return h, nil
}

func (h *hugeFile) forget() error {
	if h == nil {
		return nil
	}
	huge.Lock()
	defer huge.Unlock()
	huge.files = slices.DeleteFunc(huge.files, func(o *hugeFile) bool { return o == h })
	return unix.Close(h.fd)
}

// hugeAt finds the hugetlb mapping that address p lies in. Its file stays open for as long as the mapping's owner keeps it.
func hugeAt(p uintptr) *hugeFile {
	huge.Lock()
	defer huge.Unlock()
	i := slices.IndexFunc(huge.files, func(h *hugeFile) bool { return h.start <= p && p < h.end })
	if i < 0 {
		return nil
	}
	return huge.files[i]
}
