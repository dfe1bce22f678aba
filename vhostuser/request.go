package vhostuser

import "fmt"

// Request is the code of a message from the front-end to the back-end (VHOST_USER_*).
type Request uint32

// The front-end requests of the specification. Those which are not rows of the table are not served; they have names
// so that a refusal can say what was refused.
const (
	ReqGetFeatures         Request = 1
	ReqSetFeatures         Request = 2
	ReqSetOwner            Request = 3
	ReqResetOwner          Request = 4
	ReqSetMemTable         Request = 5
	ReqSetLogBase          Request = 6
	ReqSetLogFD            Request = 7
	ReqSetVringNum         Request = 8
	ReqSetVringAddr        Request = 9
	ReqSetVringBase        Request = 10
	ReqGetVringBase        Request = 11
	ReqSetVringKick        Request = 12
	ReqSetVringCall        Request = 13
	ReqSetVringErr         Request = 14
	ReqGetProtocolFeatures Request = 15
	ReqSetProtocolFeatures Request = 16
	ReqGetQueueNum         Request = 17
	ReqSetVringEnable      Request = 18
	ReqSendRARP            Request = 19
	ReqNetSetMTU           Request = 20
	ReqSetBackendReqFD     Request = 21
	ReqIOTLBMsg            Request = 22
	ReqSetVringEndian      Request = 23
	ReqGetConfig           Request = 24
	ReqSetConfig           Request = 25
	ReqCreateCryptoSession Request = 26
	ReqCloseCryptoSession  Request = 27
	ReqPostcopyAdvise      Request = 28
	ReqPostcopyListen      Request = 29
	ReqPostcopyEnd         Request = 30
	ReqGetInflightFD       Request = 31
	ReqSetInflightFD       Request = 32
	ReqGPUSetSocket        Request = 33
	ReqResetDevice         Request = 34
	ReqVringKick           Request = 35
	ReqGetMaxMemSlots      Request = 36
	ReqAddMemReg           Request = 37
	ReqRemMemReg           Request = 38
	ReqSetStatus           Request = 39
	ReqGetStatus           Request = 40
	ReqGetSharedObject     Request = 41
	ReqSetDeviceStateFD    Request = 42
	ReqCheckDeviceState    Request = 43
	ReqGetShmemConfig      Request = 44
)

// unservedNames are the known requests that have no row in the table.
var unservedNames = map[Request]string{
	ReqSetLogBase: "SET_LOG_BASE", ReqSetLogFD: "SET_LOG_FD",
	ReqIOTLBMsg: "IOTLB_MSG", ReqSetVringEndian: "SET_VRING_ENDIAN",
	ReqCreateCryptoSession: "CREATE_CRYPTO_SESSION", ReqCloseCryptoSession: "CLOSE_CRYPTO_SESSION",
	ReqPostcopyAdvise: "POSTCOPY_ADVISE", ReqPostcopyListen: "POSTCOPY_LISTEN", ReqPostcopyEnd: "POSTCOPY_END",
	ReqGetInflightFD: "GET_INFLIGHT_FD", ReqSetInflightFD: "SET_INFLIGHT_FD",
	ReqGPUSetSocket: "GPU_SET_SOCKET", ReqVringKick: "VRING_KICK",
	ReqGetSharedObject: "GET_SHARED_OBJECT", ReqSetDeviceStateFD: "SET_DEVICE_STATE_FD",
	ReqCheckDeviceState: "CHECK_DEVICE_STATE", ReqGetShmemConfig: "GET_SHMEM_CONFIG",
}

// String is the specification's name without its VHOST_USER_ prefix.
func (r Request) String() string {
	if row, ok := frontEndTable[r]; ok {
		return row.name
	}
	if name, ok := unservedNames[r]; ok {
		return name
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Pauses tells which queues must stand still while the back-end serves the request.
func (r Request) Pauses() Pause { return frontEndTable[r].pause }

// BackendRequest is the code of a message from the back-end to the front-end over the back channel
// (VHOST_USER_BACKEND_*). Its numbers overlap with those of Request.
type BackendRequest uint32

// The back channel requests that vhostd sends.
const BackendConfigChange BackendRequest = 2

// String is the specification's name without its VHOST_USER_ prefix.
func (r BackendRequest) String() string {
	if row, ok := backChannelTable[r]; ok {
		return row.name
	}
	return fmt.Sprintf("back-end request %d", uint32(r))
}
