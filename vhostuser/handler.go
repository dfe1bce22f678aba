package vhostuser

// Handler is a back-end device as the front-end sees it: one method per request. Serve calls one method at a time, from
// one goroutine, and only after the wire-level checks (doc.go): vring indices are below Options.MaxVrings, features are
// a subset of those offered.
//
// Descriptors that are passed to a method belong to the Handler from the moment of the call, also if it returns an
// error. Slices belong to it, too.
//
// An error refuses that one request: a non-zero ack if the front-end asked for one, the end of the session if it did
// not, or if the error is wrapped with Fatal. Methods that answer a request without an error result cannot fail.
// GetFeatures and GetProtocolFeatures are also called for the checks of other requests.
type Handler interface {
	// GetFeatures returns the virtio features on offer, FProtocolFeatures among them if there are protocol features.
	GetFeatures() uint64
	// SetFeatures takes the features that the driver and the front-end acked. It comes again with the same value for
	// each queue pair, and while queues run. If FProtocolFeatures is not among them, every vring is enabled at once.
	SetFeatures(features uint64) error
	// GetProtocolFeatures returns the protocol features on offer.
	GetProtocolFeatures() ProtocolFeatures
	// SetProtocolFeatures takes the acked protocol features.
	SetProtocolFeatures(features ProtocolFeatures) error

	// SetOwner starts the session. A second one without a ResetOwner between does not get here.
	SetOwner() error
	// ResetOwner is deprecated; the specification recommends to disable all vrings, or to do nothing.
	ResetOwner() error
	// ResetDevice disables all vrings and returns the device to its initial state; the owner stays.
	ResetDevice() error

	// SetMemTable replaces guest memory by 1 to MaxMemTableRegions regions; fds[i] is the file of regions[i].
	SetMemTable(regions []MemoryRegion, fds []int) error
	// AddMemReg adds one region of guest memory.
	AddMemReg(region MemoryRegion, fd int) error
	// RemMemReg removes the region with the same guest address, user address and size. MmapOffset is to be ignored.
	RemMemReg(region MemoryRegion) error
	// GetMaxMemSlots returns how many regions AddMemReg can reach.
	GetMaxMemSlots() uint64

	// GetQueueNum returns the number of queues; for a network device these are queue pairs, not virtqueues.
	GetQueueNum() uint64
	// SetVringNum sets the number of entries of the vring. Its limits are the Handler's to check.
	SetVringNum(index int, num uint32) error
	// SetVringAddr sets where the vring's three parts are, as user addresses of the front-end.
	SetVringAddr(index int, addr VringAddr) error
	// SetVringBase sets where to go on. Split: the next available index, 16 bits. Packed: available index and wrap
	// counter in the low half, used index and wrap counter in the high half.
	SetVringBase(index int, base uint32) error
	// GetVringBase stops the vring after what is in flight has completed, and returns its base. The front-end waits:
	// it must return in bounded time, and for a vring that was never set up it returns the base that it would start
	// from. An error ends the session.
	GetVringBase(index int) (uint32, error)
	// SetVringKick sets the eventfd that the driver's notifications arrive on, and starts the vring. fd is -1 if there
	// is none: then the vring is to be polled.
	SetVringKick(index int, fd int) error
	// SetVringCall sets the eventfd that notifies the driver; fd is -1 if the driver polls.
	SetVringCall(index int, fd int) error
	// SetVringErr sets the eventfd that reports a broken vring; fd is -1 if there is none.
	SetVringErr(index int, fd int) error
	// SetVringEnable enables or disables a vring. It may come before SetFeatures.
	SetVringEnable(index int, enable bool) error

	// SendRARP asks to announce the guest's MAC address on the network after a migration.
	SendRARP(mac [6]byte) error
	// NetSetMTU tells the MTU that the guest is shown; an error says that the network cannot carry it.
	NetSetMTU(mtu uint16) error
	// GetConfig returns size bytes of the device configuration space (virtio-v1.2 §2.5) from offset on; offset+size is at
	// most MaxConfigSize. An error, or a slice of another length, becomes the empty reply that the specification has
	// for errors.
	GetConfig(offset, size uint32) ([]byte, error)
	// SetConfig writes data into the device configuration space. Flags must be checked: a field that is read-only for
	// the driver may be written only with ConfigMigration.
	SetConfig(config DeviceConfig) error
	// SetStatus takes the virtio device status byte (virtio-v1.2 §2.1); 0 is a device reset.
	SetStatus(status uint8) error
	// GetStatus returns the virtio device status byte.
	GetStatus() uint8
	// SetBackendReqFD hands over the back channel. The Handler owns it and closes it at the end of the session, or
	// when another one takes its place.
	SetBackendReqFD(back *BackendConn) error
}
