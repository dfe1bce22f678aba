package vhostuser

import (
	"encoding/binary"
	"fmt"
)

// native is the byte order of all numbers on the socket: "machine native", as both ends are on one host.
var native = binary.NativeEndian

// Limits of single payloads.
const (
	MaxMemTableRegions = 8   // regions of one SET_MEM_TABLE
	MaxConfigSize      = 256 // bytes of device configuration space, offset included
)

// Sizes of payloads in bytes.
const (
	vringAddrSize    = 40
	regionSize       = 32
	memTableHeader   = 8 // count, padding
	memRegionSize    = 8 + regionSize
	configHeaderSize = 12
)

// vringNoFD in the payload of SET_VRING_KICK, _CALL and _ERR says that no descriptor comes with it; the bits above it
// are reserved, those below are the vring index.
const (
	vringNoFD      uint64 = 1 << 8
	vringIndexMask uint64 = 0xff
)

// VringState is a number about one vring.
type VringState struct {
	Index uint32 // vring index
	Num   uint32 // ring size in entries, base, or 0/1 for disable/enable
}

func (s VringState) encode() []byte {
	b := native.AppendUint32(make([]byte, 0, 8), s.Index)
	return native.AppendUint32(b, s.Num)
}

func decodeVringState(b []byte) VringState {
	return VringState{Index: native.Uint32(b), Num: native.Uint32(b[4:])}
}

// VringFlagLog in VringAddr.Flags asks to log writes to the used ring at VringAddr.Log (VHOST_VRING_F_LOG).
const VringFlagLog uint32 = 1 << 0

// VringAddr says where the parts of a vring are. Desc, Used and Avail are user addresses of the front-end (guest I/O
// addresses with an IOMMU), Log is a guest physical address.
type VringAddr struct {
	Index uint32 // vring index
	Flags uint32 // VringFlagLog
	Desc  uint64 // descriptor table, or the packed descriptor ring
	Used  uint64 // used ring, or the packed device event suppression area
	Avail uint64 // available ring, or the packed driver event suppression area
	Log   uint64 // where writes to the used ring are logged
}

func (a VringAddr) encode() []byte {
	b := native.AppendUint32(make([]byte, 0, vringAddrSize), a.Index)
	b = native.AppendUint32(b, a.Flags)
	for _, v := range [...]uint64{a.Desc, a.Used, a.Avail, a.Log} {
		b = native.AppendUint64(b, v)
	}
	return b
}

func decodeVringAddr(b []byte) VringAddr {
	return VringAddr{
		Index: native.Uint32(b), Flags: native.Uint32(b[4:]),
		Desc: native.Uint64(b[8:]), Used: native.Uint64(b[16:]), Avail: native.Uint64(b[24:]), Log: native.Uint64(b[32:]),
	}
}

// MemoryRegion is one region of guest memory. Nothing about it has been checked but its presence.
type MemoryRegion struct {
	GuestAddr  uint64 // guest physical address of its first byte
	Size       uint64 // bytes
	UserAddr   uint64 // address of its first byte in the front-end's address space
	MmapOffset uint64 // offset of its first byte in the file that comes with it
}

func (r MemoryRegion) append(b []byte) []byte {
	for _, v := range [...]uint64{r.GuestAddr, r.Size, r.UserAddr, r.MmapOffset} {
		b = native.AppendUint64(b, v)
	}
	return b
}

func decodeRegion(b []byte) MemoryRegion {
	return MemoryRegion{
		GuestAddr: native.Uint64(b), Size: native.Uint64(b[8:]),
		UserAddr: native.Uint64(b[16:]), MmapOffset: native.Uint64(b[24:]),
	}
}

// MemTable is the payload of SET_MEM_TABLE.
type MemTable []MemoryRegion

func (t MemTable) encode() []byte {
	b := make([]byte, 0, memTableHeader+len(t)*regionSize)
	b = native.AppendUint32(b, uint32(len(t)))
	b = native.AppendUint32(b, 0)
	for _, r := range t {
		b = r.append(b)
	}
	return b
}

func decodeMemTable(b []byte) MemTable {
	t := make(MemTable, native.Uint32(b))
	for i := range t {
		t[i] = decodeRegion(b[memTableHeader+i*regionSize:])
	}
	return t
}

func checkMemTableSize(p []byte) error {
	if len(p) < memTableHeader {
		return fmt.Errorf("%w: payload of %d bytes, want at least %d", ErrProtocol, len(p), memTableHeader)
	}
	n := native.Uint32(p)
	if n == 0 || n > MaxMemTableRegions {
		return fmt.Errorf("%w: %d memory regions, want 1 to %d", ErrProtocol, n, MaxMemTableRegions)
	}
	if want := memTableHeader + int(n)*regionSize; len(p) != want {
		return fmt.Errorf("%w: payload of %d bytes, want %d for %d regions", ErrProtocol, len(p), want, n)
	}
	return nil
}

// encodeMemRegion is the payload of ADD_MEM_REG and REM_MEM_REG.
func encodeMemRegion(r MemoryRegion) []byte {
	return r.append(native.AppendUint64(make([]byte, 0, memRegionSize), 0))
}

func decodeMemRegion(b []byte) MemoryRegion { return decodeRegion(b[8:]) }

// ConfigMigration in DeviceConfig.Flags says that the device configuration is restored after a migration, so that also
// fields that are read-only for the driver are written (VHOST_SET_CONFIG_TYPE_MIGRATION).
const ConfigMigration uint32 = 1

// DeviceConfig is a part of the device configuration space. On the socket its length is written twice, in the header
// of the message and in the payload; both have to agree.
type DeviceConfig struct {
	Offset uint32 // of Data in the configuration space, bytes
	Flags  uint32 // 0: the driver writes its fields; ConfigMigration
	Data   []byte
}

func (c DeviceConfig) encode() []byte {
	b := make([]byte, 0, configHeaderSize+len(c.Data))
	b = native.AppendUint32(b, c.Offset)
	b = native.AppendUint32(b, uint32(len(c.Data)))
	b = native.AppendUint32(b, c.Flags)
	return append(b, c.Data...)
}

func decodeConfig(b []byte) DeviceConfig {
	return DeviceConfig{Offset: native.Uint32(b), Flags: native.Uint32(b[8:]), Data: b[configHeaderSize:]}
}

func checkConfigSize(p []byte) error {
	if len(p) < configHeaderSize {
		return fmt.Errorf("%w: payload of %d bytes, want at least %d", ErrProtocol, len(p), configHeaderSize)
	}
	offset, size := uint64(native.Uint32(p)), uint64(native.Uint32(p[4:]))
	if offset+size > MaxConfigSize {
		return fmt.Errorf("%w: configuration bytes %d to %d, limit %d", ErrProtocol, offset, offset+size, MaxConfigSize)
	}
	if want := configHeaderSize + size; uint64(len(p)) != want {
		return fmt.Errorf("%w: payload of %d bytes, want %d for %d configuration bytes", ErrProtocol, len(p), want, size)
	}
	return nil
}

func encodeU64(v uint64) []byte { return native.AppendUint64(make([]byte, 0, 8), v) }
