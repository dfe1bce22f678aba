package vhostuser

import "fmt"

func (f *FrontEnd) getU64(req Request) (uint64, error) {
	b, err := f.call(req, nil)
	if err != nil {
		return 0, err
	}
	return native.Uint64(b), nil
}

// wrong ends the connection after a reply of the right form that makes no sense, as after any other that is wrong.
func (f *FrontEnd) wrong(req Request, err error) error {
	f.conn.Close()
	return &RequestError{req, err}
}

func (f *FrontEnd) set(req Request, payload []byte, fds ...int) error {
	_, err := f.call(req, payload, fds...)
	return err
}

// GetFeatures asks for the virtio features on offer.
func (f *FrontEnd) GetFeatures() (uint64, error) { return f.getU64(ReqGetFeatures) }

// SetFeatures acks virtio features.
func (f *FrontEnd) SetFeatures(features uint64) error {
	return f.set(ReqSetFeatures, encodeU64(features))
}

// GetProtocolFeatures asks for the protocol features on offer.
func (f *FrontEnd) GetProtocolFeatures() (ProtocolFeatures, error) {
	v, err := f.getU64(ReqGetProtocolFeatures)
	return ProtocolFeatures(v), err
}

// SetProtocolFeatures acks protocol features. REPLY_ACK takes effect with the next request.
func (f *FrontEnd) SetProtocolFeatures(features ProtocolFeatures) error {
	if err := f.set(ReqSetProtocolFeatures, encodeU64(uint64(features))); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.protocol = features
	return nil
}

// SetOwner starts the session.
func (f *FrontEnd) SetOwner() error { return f.set(ReqSetOwner, nil) }

// ResetOwner is deprecated.
func (f *FrontEnd) ResetOwner() error { return f.set(ReqResetOwner, nil) }

// ResetDevice returns the device to its initial state.
func (f *FrontEnd) ResetDevice() error { return f.set(ReqResetDevice, nil) }

// SetMemTable replaces guest memory; fds[i] is the file of regions[i].
func (f *FrontEnd) SetMemTable(regions []MemoryRegion, fds []int) error {
	return f.set(ReqSetMemTable, MemTable(regions).encode(), fds...)
}

// AddMemReg adds a region of guest memory.
func (f *FrontEnd) AddMemReg(region MemoryRegion, fd int) error {
	return f.set(ReqAddMemReg, encodeMemRegion(region), fd)
}

// RemMemReg removes a region of guest memory.
func (f *FrontEnd) RemMemReg(region MemoryRegion) error {
	return f.set(ReqRemMemReg, encodeMemRegion(region))
}

// GetMaxMemSlots asks how many regions AddMemReg can reach.
func (f *FrontEnd) GetMaxMemSlots() (uint64, error) { return f.getU64(ReqGetMaxMemSlots) }

// GetQueueNum asks for the number of queues, queue pairs for a network device.
func (f *FrontEnd) GetQueueNum() (uint64, error) { return f.getU64(ReqGetQueueNum) }

// SetVringNum sets the number of entries of a vring.
func (f *FrontEnd) SetVringNum(index, num uint32) error {
	return f.set(ReqSetVringNum, VringState{index, num}.encode())
}

// SetVringAddr sets where the parts of vring addr.Index are.
func (f *FrontEnd) SetVringAddr(addr VringAddr) error { return f.set(ReqSetVringAddr, addr.encode()) }

// SetVringBase sets where a vring goes on; see Handler.SetVringBase.
func (f *FrontEnd) SetVringBase(index, base uint32) error {
	return f.set(ReqSetVringBase, VringState{index, base}.encode())
}

// GetVringBase stops a vring and asks for its base.
func (f *FrontEnd) GetVringBase(index uint32) (uint32, error) {
	b, err := f.call(ReqGetVringBase, VringState{Index: index}.encode())
	if err != nil {
		return 0, err
	}
	state := decodeVringState(b)
	if state.Index != index {
		return 0, f.wrong(ReqGetVringBase, fmt.Errorf("%w: base of vring %d, asked for %d", ErrProtocol, state.Index, index))
	}
	return state.Num, nil
}

// SetVringKick passes the kick eventfd of a vring; -1 is none.
func (f *FrontEnd) SetVringKick(index uint32, fd int) error {
	return f.setFD(ReqSetVringKick, index, fd)
}

// SetVringCall passes the call eventfd of a vring; -1 is none.
func (f *FrontEnd) SetVringCall(index uint32, fd int) error {
	return f.setFD(ReqSetVringCall, index, fd)
}

// SetVringErr passes the error eventfd of a vring; -1 is none.
func (f *FrontEnd) SetVringErr(index uint32, fd int) error { return f.setFD(ReqSetVringErr, index, fd) }

func (f *FrontEnd) setFD(req Request, index uint32, fd int) error {
	if fd < 0 {
		return f.set(req, encodeU64(uint64(index)|vringNoFD))
	}
	return f.set(req, encodeU64(uint64(index)), fd)
}

// SetVringEnable enables or disables a vring.
func (f *FrontEnd) SetVringEnable(index uint32, enable bool) error {
	state := VringState{Index: index}
	if enable {
		state.Num = 1
	}
	return f.set(ReqSetVringEnable, state.encode())
}

// SendRARP asks to announce the guest's MAC address.
func (f *FrontEnd) SendRARP(mac [6]byte) error {
	return f.set(ReqSendRARP, append(mac[:], 0, 0))
}

// NetSetMTU tells the MTU that the guest is shown.
func (f *FrontEnd) NetSetMTU(mtu uint16) error { return f.set(ReqNetSetMTU, encodeU64(uint64(mtu))) }

// GetConfig reads size bytes of the device configuration space. A refusal is a NACKError of value 0.
func (f *FrontEnd) GetConfig(offset, size uint32) ([]byte, error) {
	size = min(size, MaxConfigSize+1) // one too many is refused by the check of the payload
	b, err := f.call(ReqGetConfig, DeviceConfig{Offset: offset, Data: make([]byte, size)}.encode())
	if err != nil {
		return nil, err
	}
	got := decodeConfig(b)
	if got.Offset != offset || uint32(len(got.Data)) != size {
		return nil, f.wrong(ReqGetConfig, fmt.Errorf("%w: %d configuration bytes from %d on, asked for %d from %d on",
			ErrProtocol, len(got.Data), got.Offset, size, offset))
	}
	return got.Data, nil
}

// SetConfig writes config.Data into the device configuration space.
func (f *FrontEnd) SetConfig(config DeviceConfig) error { return f.set(ReqSetConfig, config.encode()) }

// SetStatus passes the virtio device status byte.
func (f *FrontEnd) SetStatus(status uint8) error {
	return f.set(ReqSetStatus, encodeU64(uint64(status)))
}

// GetStatus asks for the virtio device status byte.
func (f *FrontEnd) GetStatus() (uint8, error) {
	v, err := f.getU64(ReqGetStatus)
	if v > 0xff {
		return 0, f.wrong(ReqGetStatus, fmt.Errorf("%w: device status %#x, limit %#x", ErrProtocol, v, 0xff))
	}
	return uint8(v), err
}
