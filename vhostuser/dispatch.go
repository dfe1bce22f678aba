package vhostuser

import "fmt"

// dispatchTable has the typed call for each row of frontEndTable. Size and descriptors of the message are right, index
// is the vring's, or -1. It returns the payload of the reply where the row has one.
var dispatchTable = map[Request]func(s *session, m *Message, index int) ([]byte, error){
	ReqGetFeatures: func(s *session, _ *Message, _ int) ([]byte, error) {
		return encodeU64(s.handler.GetFeatures()), nil
	},
	ReqSetFeatures: (*session).setFeatures,
	ReqSetOwner:    (*session).setOwner,
	ReqResetOwner: func(s *session, _ *Message, _ int) ([]byte, error) {
		s.owned = false
		return nil, s.handler.ResetOwner()
	},
	ReqSetMemTable: func(s *session, m *Message, _ int) ([]byte, error) {
		return nil, s.handler.SetMemTable(decodeMemTable(m.Payload), m.TakeFDs())
	},
	ReqSetVringNum: func(s *session, m *Message, index int) ([]byte, error) {
		return nil, s.handler.SetVringNum(index, decodeVringState(m.Payload).Num)
	},
	ReqSetVringAddr: (*session).setVringAddr,
	ReqSetVringBase: func(s *session, m *Message, index int) ([]byte, error) {
		return nil, s.handler.SetVringBase(index, decodeVringState(m.Payload).Num)
	},
	ReqGetVringBase: func(s *session, _ *Message, index int) ([]byte, error) {
		base, err := s.handler.GetVringBase(index)
		return VringState{uint32(index), base}.encode(), err
	},
	ReqSetVringKick: func(s *session, m *Message, index int) ([]byte, error) {
		return nil, s.handler.SetVringKick(index, takeOne(m))
	},
	ReqSetVringCall: func(s *session, m *Message, index int) ([]byte, error) {
		return nil, s.handler.SetVringCall(index, takeOne(m))
	},
	ReqSetVringErr: func(s *session, m *Message, index int) ([]byte, error) {
		return nil, s.handler.SetVringErr(index, takeOne(m))
	},
	ReqGetProtocolFeatures: func(s *session, _ *Message, _ int) ([]byte, error) {
		return encodeU64(uint64(s.handler.GetProtocolFeatures())), nil
	},
	ReqSetProtocolFeatures: (*session).setProtocolFeatures,
	ReqGetQueueNum: func(s *session, _ *Message, _ int) ([]byte, error) {
		return encodeU64(s.handler.GetQueueNum()), nil
	},
	ReqSetVringEnable:  (*session).setVringEnable,
	ReqSendRARP:        (*session).sendRARP,
	ReqNetSetMTU:       (*session).netSetMTU,
	ReqSetBackendReqFD: (*session).setBackendReqFD,
	ReqGetConfig:       (*session).getConfig,
	ReqSetConfig: func(s *session, m *Message, _ int) ([]byte, error) {
		return nil, s.handler.SetConfig(decodeConfig(m.Payload))
	},
	ReqResetDevice: func(s *session, _ *Message, _ int) ([]byte, error) {
		return nil, s.handler.ResetDevice()
	},
	ReqGetMaxMemSlots: func(s *session, _ *Message, _ int) ([]byte, error) {
		return encodeU64(s.handler.GetMaxMemSlots()), nil
	},
	ReqAddMemReg: func(s *session, m *Message, _ int) ([]byte, error) {
		return nil, s.handler.AddMemReg(decodeMemRegion(m.Payload), takeOne(m))
	},
	// Some front-ends send a descriptor with it, which has no use: it is not taken, and so closed.
	ReqRemMemReg: func(s *session, m *Message, _ int) ([]byte, error) {
		return nil, s.handler.RemMemReg(decodeMemRegion(m.Payload))
	},
	ReqSetStatus: (*session).setStatus,
	ReqGetStatus: func(s *session, _ *Message, _ int) ([]byte, error) {
		return encodeU64(uint64(s.handler.GetStatus())), nil
	},
}

// takeOne takes the message's only descriptor; -1 if there is none.
func takeOne(m *Message) int {
	if fds := m.TakeFDs(); len(fds) > 0 {
		return fds[0]
	}
	return -1
}

func (s *session) setFeatures(m *Message, _ int) ([]byte, error) {
	acked := native.Uint64(m.Payload)
	if extra := acked &^ s.handler.GetFeatures(); extra != 0 {
		return nil, Fatal(fmt.Errorf("%w: acks features that were not offered: %#x", ErrProtocol, extra))
	}
	return nil, s.handler.SetFeatures(acked)
}

func (s *session) setProtocolFeatures(m *Message, _ int) ([]byte, error) {
	acked := ProtocolFeatures(native.Uint64(m.Payload))
	if err := checkProtocol(acked, s.handler.GetProtocolFeatures()); err != nil {
		return nil, Fatal(err)
	}
	if err := s.handler.SetProtocolFeatures(acked); err != nil {
		return nil, err
	}
	s.protocol = acked
	return nil, nil
}

func (s *session) setOwner(*Message, int) ([]byte, error) {
	if s.owned {
		return nil, fmt.Errorf("%w: the session has an owner", ErrProtocol)
	}
	if err := s.handler.SetOwner(); err != nil {
		return nil, err
	}
	s.owned = true
	return nil, nil
}

func (s *session) setVringAddr(m *Message, index int) ([]byte, error) {
	addr := decodeVringAddr(m.Payload)
	if reserved := addr.Flags &^ VringFlagLog; reserved != 0 {
		return nil, fmt.Errorf("%w: reserved vring flags %#x", ErrProtocol, reserved)
	}
	return nil, s.handler.SetVringAddr(index, addr)
}

func (s *session) setVringEnable(m *Message, index int) ([]byte, error) {
	num := decodeVringState(m.Payload).Num
	if num > 1 {
		return nil, fmt.Errorf("%w: vring %d enable %d, want 0 or 1", ErrProtocol, index, num)
	}
	return nil, s.handler.SetVringEnable(index, num == 1)
}

// sendRARP: the address is the first six bytes of the payload in memory order, whatever the byte order of numbers.
func (s *session) sendRARP(m *Message, _ int) ([]byte, error) {
	return nil, s.handler.SendRARP([6]byte(m.Payload[:6]))
}

func (s *session) netSetMTU(m *Message, _ int) ([]byte, error) {
	mtu := native.Uint64(m.Payload)
	if mtu > 0xffff {
		return nil, fmt.Errorf("%w: MTU %d, limit %d", ErrProtocol, mtu, 0xffff)
	}
	return nil, s.handler.NetSetMTU(uint16(mtu))
}

func (s *session) setStatus(m *Message, _ int) ([]byte, error) {
	status := native.Uint64(m.Payload)
	if status > 0xff {
		return nil, fmt.Errorf("%w: device status %#x, limit %#x", ErrProtocol, status, 0xff)
	}
	return nil, s.handler.SetStatus(uint8(status))
}

func (s *session) getConfig(m *Message, _ int) ([]byte, error) {
	want := decodeConfig(m.Payload)
	data, err := s.handler.GetConfig(want.Offset, uint32(len(want.Data)))
	if err != nil {
		return nil, err
	}
	if len(data) != len(want.Data) {
		return nil, fmt.Errorf("%d configuration bytes from %d on, want %d", len(data), want.Offset, len(want.Data))
	}
	return DeviceConfig{want.Offset, want.Flags, data}.encode(), nil
}

func (s *session) setBackendReqFD(m *Message, _ int) ([]byte, error) {
	conn, err := NewConnFD(takeOne(m), ConnOptions{PartialTimeout: s.conn.partial, WriteTimeout: s.conn.write})
	if err != nil {
		return nil, fmt.Errorf("%w: back channel: %w", ErrProtocol, err)
	}
	return nil, s.handler.SetBackendReqFD(&BackendConn{conn: conn, protocol: s.protocol, wait: s.conn.partial})
}
