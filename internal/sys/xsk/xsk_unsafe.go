package xsk

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
)

// oldUmemReg is the size of struct xdp_umem_reg as kernels before 6.8 know it: without the length of the metadata.
const oldUmemReg = unsafe.Offsetof(unix.XDPUmemReg{}.Tx_metadata_len)

func registerMemory(fd int, c Config) error {
	reg := unix.XDPUmemReg{
		Addr: uint64(shm.Addr(c.Memory)), Len: uint64(len(c.Memory)), Size: uint32(c.Chunk), Headroom: uint32(c.Headroom),
	}
	size := oldUmemReg
	if c.Unaligned {
		reg.Flags |= unix.XDP_UMEM_UNALIGNED_CHUNK_FLAG
	}
	if c.Metadata > 0 {
		reg.Flags |= unix.XDP_UMEM_TX_METADATA_LEN
		reg.Tx_metadata_len = uint32(c.Metadata)
		size = unsafe.Sizeof(reg)
	}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_UMEM_REG, uintptr(unsafe.Pointer(&reg)), size, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// get reads a socket option of the size of v.
func get[T any](fd, opt int, v *T) error {
	n := uint32(unsafe.Sizeof(*v))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt),
		uintptr(unsafe.Pointer(v)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func mmapOffsets(fd int) (off unix.XDPMmapOffsets, err error) {
	err = get(fd, unix.XDP_MMAP_OFFSETS, &off)
	return off, err
}

// Statistics are the kernel's counters of the socket.
func (s *Socket) Statistics() (st unix.XDPStatistics, err error) {
	err = get(s.fd, unix.XDP_STATISTICS, &st)
	return st, err
}
