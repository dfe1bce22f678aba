package vhostuser

import (
	"fmt"
	"math/bits"
	"strings"
)

// FProtocolFeatures is bit 30 of the virtio feature bits, VHOST_USER_F_PROTOCOL_FEATURES: offered, it makes
// GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES legal, even before SET_FEATURES; acked, it makes virtqueues start
// disabled.
const FProtocolFeatures uint64 = 1 << 30

// ProtocolFeatures is a set of vhost-user protocol feature bits: bit n of the value is protocol feature n.
type ProtocolFeatures uint64

// The protocol features (VHOST_USER_PROTOCOL_F_*).
const (
	ProtocolMQ                ProtocolFeatures = 1 << 0  // GET_QUEUE_NUM
	ProtocolLogShmFD          ProtocolFeatures = 1 << 1  // dirty log in shared memory
	ProtocolRARP              ProtocolFeatures = 1 << 2  // SEND_RARP
	ProtocolReplyAck          ProtocolFeatures = 1 << 3  // any request can be acked
	ProtocolNetMTU            ProtocolFeatures = 1 << 4  // NET_SET_MTU
	ProtocolBackendReq        ProtocolFeatures = 1 << 5  // back channel, SET_BACKEND_REQ_FD
	ProtocolCrossEndian       ProtocolFeatures = 1 << 6  // SET_VRING_ENDIAN
	ProtocolCryptoSession     ProtocolFeatures = 1 << 7  // crypto sessions
	ProtocolPageFault         ProtocolFeatures = 1 << 8  // postcopy migration
	ProtocolConfig            ProtocolFeatures = 1 << 9  // GET_CONFIG, SET_CONFIG
	ProtocolBackendSendFD     ProtocolFeatures = 1 << 10 // descriptors on the back channel
	ProtocolHostNotifier      ProtocolFeatures = 1 << 11 // doorbells of hardware
	ProtocolInflightShmFD     ProtocolFeatures = 1 << 12 // inflight region
	ProtocolResetDevice       ProtocolFeatures = 1 << 13 // RESET_DEVICE
	ProtocolInbandNotify      ProtocolFeatures = 1 << 14 // kicks and calls as messages
	ProtocolConfigureMemSlots ProtocolFeatures = 1 << 15 // ADD_MEM_REG, REM_MEM_REG, GET_MAX_MEM_SLOTS
	ProtocolStatus            ProtocolFeatures = 1 << 16 // SET_STATUS, GET_STATUS
	ProtocolXenMmap           ProtocolFeatures = 1 << 17 // Xen memory regions
	ProtocolSharedObject      ProtocolFeatures = 1 << 18 // virtio dma-buf
	ProtocolDeviceState       ProtocolFeatures = 1 << 19 // device state at migration
)

var protocolNames = [...]string{
	"MQ", "LOG_SHMFD", "RARP", "REPLY_ACK", "NET_MTU", "BACKEND_REQ", "CROSS_ENDIAN", "CRYPTO_SESSION", "PAGEFAULT",
	"CONFIG", "BACKEND_SEND_FD", "HOST_NOTIFIER", "INFLIGHT_SHMFD", "RESET_DEVICE", "INBAND_NOTIFICATIONS",
	"CONFIGURE_MEM_SLOTS", "STATUS", "XEN_MMAP", "SHARED_OBJECT", "DEVICE_STATE",
}

// String lists the names of the bits that are set, lowest first, joined with "|"; "0" if there are none.
func (f ProtocolFeatures) String() string {
	var names []string
	for rest := uint64(f); rest != 0; rest &= rest - 1 {
		bit := bits.TrailingZeros64(rest)
		if bit < len(protocolNames) {
			names = append(names, protocolNames[bit])
		} else {
			names = append(names, fmt.Sprintf("bit%d", bit))
		}
	}
	if names == nil {
		return "0"
	}
	return strings.Join(names, "|")
}

// checkProtocol says why the front-end may not ack this set of protocol features; nil if it may.
func checkProtocol(acked, offered ProtocolFeatures) error {
	if extra := acked &^ offered; extra != 0 {
		return fmt.Errorf("%w: acks protocol features that were not offered: %v", ErrProtocol, extra)
	}
	const needed = ProtocolBackendReq | ProtocolReplyAck
	if acked&ProtocolInbandNotify != 0 && acked&needed != needed {
		return fmt.Errorf("%w: acks INBAND_NOTIFICATIONS without %v", ErrProtocol, needed)
	}
	return nil
}
