package vhostuser

import "fmt"

// Pause says which virtqueues must stand still while a request is served.
type Pause uint8

// The values of Pause.
const (
	PauseNone  Pause = iota // queues keep running
	PauseVring              // the queue that the request names
	PauseAll                // every queue of the device
)

// payloadKind is the layout of a payload.
type payloadKind uint8

const (
	noPayload    payloadKind = iota // 0 bytes
	u64Payload                      // one 64-bit integer
	vringFD                         // one 64-bit integer: vring index in bits 0-7, "no descriptor follows" in bit 8
	vringState                      // VringState
	vringAddr                       // VringAddr
	memTable                        // count, padding, 1 to MaxMemTableRegions MemoryRegions
	memRegion                       // padding, one MemoryRegion
	deviceConfig                    // DeviceConfig
)

// row is what the protocol says about one message.
type row struct {
	name           string
	payload        payloadKind
	minFDs, maxFDs int
	reply          payloadKind // noPayload: nothing but the ack that need_reply asks for
	pause          Pause
	needs          ProtocolFeatures // 0, or the bit that makes the message legal
	negotiated     bool             // the bit must have been acked; otherwise it is enough that it was offered
}

// frontEndTable has a row for each request that the back-end serves. A request without a row is refused.
//
// Which bit must be offered and which must be acked follows the wording of the specification for each message.
var frontEndTable = map[Request]row{
	ReqGetFeatures:         {name: "GET_FEATURES", reply: u64Payload},
	ReqSetFeatures:         {name: "SET_FEATURES", payload: u64Payload, pause: PauseAll},
	ReqSetOwner:            {name: "SET_OWNER"},
	ReqResetOwner:          {name: "RESET_OWNER", pause: PauseAll},
	ReqSetMemTable:         {name: "SET_MEM_TABLE", payload: memTable, minFDs: 1, maxFDs: MaxMemTableRegions, pause: PauseAll},
	ReqSetVringNum:         {name: "SET_VRING_NUM", payload: vringState, pause: PauseVring},
	ReqSetVringAddr:        {name: "SET_VRING_ADDR", payload: vringAddr, pause: PauseVring},
	ReqSetVringBase:        {name: "SET_VRING_BASE", payload: vringState, pause: PauseVring},
	ReqGetVringBase:        {name: "GET_VRING_BASE", payload: vringState, reply: vringState, pause: PauseVring},
	ReqSetVringKick:        {name: "SET_VRING_KICK", payload: vringFD, maxFDs: 1, pause: PauseVring},
	ReqSetVringCall:        {name: "SET_VRING_CALL", payload: vringFD, maxFDs: 1, pause: PauseVring},
	ReqSetVringErr:         {name: "SET_VRING_ERR", payload: vringFD, maxFDs: 1, pause: PauseVring},
	ReqGetProtocolFeatures: {name: "GET_PROTOCOL_FEATURES", reply: u64Payload},
	ReqSetProtocolFeatures: {name: "SET_PROTOCOL_FEATURES", payload: u64Payload},
	ReqGetQueueNum:         {name: "GET_QUEUE_NUM", reply: u64Payload, needs: ProtocolMQ},
	ReqSetVringEnable:      {name: "SET_VRING_ENABLE", payload: vringState, pause: PauseVring},
	ReqSendRARP:            {name: "SEND_RARP", payload: u64Payload, needs: ProtocolRARP},
	ReqNetSetMTU:           {name: "NET_SET_MTU", payload: u64Payload, needs: ProtocolNetMTU},
	ReqSetBackendReqFD:     {name: "SET_BACKEND_REQ_FD", minFDs: 1, maxFDs: 1, needs: ProtocolBackendReq},
	ReqGetConfig:           {name: "GET_CONFIG", payload: deviceConfig, reply: deviceConfig, needs: ProtocolConfig, negotiated: true},
	ReqSetConfig:           {name: "SET_CONFIG", payload: deviceConfig, needs: ProtocolConfig, negotiated: true},
	ReqResetDevice:         {name: "RESET_DEVICE", pause: PauseAll, needs: ProtocolResetDevice},
	ReqGetMaxMemSlots:      {name: "GET_MAX_MEM_SLOTS", reply: u64Payload, needs: ProtocolConfigureMemSlots, negotiated: true},
	ReqAddMemReg:           {name: "ADD_MEM_REG", payload: memRegion, minFDs: 1, maxFDs: 1, pause: PauseAll, needs: ProtocolConfigureMemSlots, negotiated: true},
	ReqRemMemReg:           {name: "REM_MEM_REG", payload: memRegion, maxFDs: 1, pause: PauseAll, needs: ProtocolConfigureMemSlots, negotiated: true},
	ReqSetStatus:           {name: "SET_STATUS", payload: u64Payload, needs: ProtocolStatus, negotiated: true},
	ReqGetStatus:           {name: "GET_STATUS", reply: u64Payload, needs: ProtocolStatus, negotiated: true},
}

// backChannelTable is the same for the requests of the back channel.
var backChannelTable = map[BackendRequest]row{
	BackendConfigChange: {name: "BACKEND_CONFIG_CHANGE_MSG", needs: ProtocolConfig, negotiated: true},
}

// check verifies payload size and number of descriptors of a message against its row.
func (r row) check(m *Message) error {
	if err := r.payload.checkSize(m.Payload); err != nil {
		return err
	}
	lo, hi := r.minFDs, r.maxFDs
	switch r.payload {
	case memTable: // one descriptor per region
		lo = int(native.Uint32(m.Payload))
		hi = lo
	case vringFD: // bit 8 says that there is none
		lo = 1
		if native.Uint64(m.Payload)&vringNoFD != 0 {
			lo = 0
		}
		hi = lo
	}
	if n := len(m.FDs); n < lo || n > hi {
		return fmt.Errorf("%w: %d file descriptors, want %d to %d", ErrProtocol, n, lo, hi)
	}
	return nil
}

// checkSize verifies that a payload has exactly the size of its kind, inner counts and sizes included.
func (k payloadKind) checkSize(p []byte) error {
	want := 0
	switch k {
	case u64Payload, vringFD, vringState:
		want = 8
	case vringAddr:
		want = vringAddrSize
	case memRegion:
		want = memRegionSize
	case memTable:
		return checkMemTableSize(p)
	case deviceConfig:
		return checkConfigSize(p)
	}
	if len(p) != want {
		return fmt.Errorf("%w: payload of %d bytes, want %d", ErrProtocol, len(p), want)
	}
	return nil
}
