// Package rpc is the language between a test on the host and the agent inside the guest.
//
// One virtio-serial port carries lines of JSON: requests to the guest, responses and one Hello per boot to the host.
// Requests run concurrently and are answered in any order, so that a transfer can run while something else happens.
// The port is a device of its own: it goes on working while the network device under test is reset, unbound or dead.
//
//	host -> guest   {"id":7,"op":"ping","args":{...}}
//	guest -> host   {"hello":{"kernel":"6.1.0"}}            the agent has started (again)
//	guest -> host   {"id":7,"result":{...}}  or  {"id":7,"error":"..."}
package rpc

import (
	"encoding/json"
	"time"

	"github.com/vhostd/vhostd/test/vm/stream"
)

// Port is the name of the virtio-serial port.
const Port = "vhostd.agent"

// Request asks the agent for one operation.
type Request struct {
	ID   uint64          `json:"id"`
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// Response answers the request of the same ID. Hello is set, and nothing else, in the first line after a boot.
type Response struct {
	ID     uint64          `json:"id,omitempty"`
	Hello  *Hello          `json:"hello,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// Hello tells that a guest is up.
type Hello struct {
	Kernel string        `json:"kernel"` // uname release
	Uptime time.Duration `json:"uptime_ns"`
}

// The operations.
const (
	OpExec    = "exec"    // ExecArgs -> ExecResult
	OpRead    = "read"    // FileArgs -> FileResult
	OpWrite   = "write"   // FileArgs -> nothing
	OpGlob    = "glob"    // FileArgs (Path is the pattern) -> GlobResult
	OpLink    = "link"    // LinkArgs -> LinkResult
	OpPing    = "ping"    // PingArgs -> PingResult
	OpTCP     = "tcp"     // TCPArgs -> stream.Result
	OpUDP     = "udp"     // UDPArgs -> stream.EchoCounters
	OpHTTP    = "http"    // HTTPArgs -> HTTPResult
	OpLookup  = "lookup"  // LookupArgs -> LookupResult
	OpServe   = "serve"   // ServeArgs -> nothing
	OpTraffic = "traffic" // TrafficArgs -> stream.EchoCounters
	OpHold    = "hold"    // HoldArgs -> nothing
	OpWatch   = "watch"   // FramesArgs -> nothing
	OpFrames  = "frames"  // FramesArgs -> FramesResult
)

// ExecArgs runs a program of the guest.
type ExecArgs struct {
	Argv    []string      `json:"argv"`
	Timeout time.Duration `json:"timeout_ns"`
}

// ExecResult is what the program wrote (both streams) and how it ended.
type ExecResult struct {
	Output string `json:"output"`
	Code   int    `json:"code"`
}

// FileArgs names a file, and what to write to it.
type FileArgs struct {
	Path string `json:"path"`
	Data string `json:"data,omitempty"`
}

// FileResult is a file's content.
type FileResult struct {
	Data string `json:"data"`
}

// GlobResult is the paths that match.
type GlobResult struct {
	Paths []string `json:"paths"`
}

// LinkArgs configures a network interface. Zero values leave alone what is there.
type LinkArgs struct {
	Name    string        `json:"name"`
	Wait    time.Duration `json:"wait_ns,omitempty"` // for the interface to appear
	Up      bool          `json:"up,omitempty"`
	MTU     int           `json:"mtu,omitempty"`
	Addrs   []string      `json:"addrs,omitempty"`   // CIDR; IPv6 ones without duplicate address detection
	Gateway string        `json:"gateway,omitempty"` // of a default route
}

// LinkResult is an interface as the guest's kernel sees it.
type LinkResult struct {
	MAC     string   `json:"mac"`
	MTU     int      `json:"mtu"`
	Up      bool     `json:"up"`      // administratively
	Carrier bool     `json:"carrier"` // operational state is up or unknown
	Addrs   []string `json:"addrs"`
	Queues  int      `json:"queues"` // transmit queues of the device
	// Gateways are those of the default routes over the interface.
	Gateways []string `json:"gateways"`

	RxPackets, TxPackets, RxBytes, TxBytes uint64
	RxErrors, TxErrors, RxDropped          uint64
}

// PingArgs sends ICMP or ICMPv6 echo requests, by the address.
type PingArgs struct {
	Addr    string        `json:"addr"`
	Size    int           `json:"size"` // payload bytes
	Count   int           `json:"count"`
	DF      bool          `json:"df,omitempty"` // never fragment
	Timeout time.Duration `json:"timeout_ns"`   // per request
}

// PingResult counts the replies whose payload was right.
type PingResult struct {
	Sent     int           `json:"sent"`
	Received int           `json:"received"`
	Bad      int           `json:"bad"`
	Fastest  time.Duration `json:"fastest_ns"`
	Slowest  time.Duration `json:"slowest_ns"`
}

// TCPArgs runs one transfer against a stream.Serve.
type TCPArgs struct {
	Addr    string        `json:"addr"`
	Mode    stream.Mode   `json:"mode"`
	Bytes   uint64        `json:"bytes"`
	Seed    uint64        `json:"seed"`
	Timeout time.Duration `json:"timeout_ns"`
	// Streams is the number of parallel connections, each with Bytes/Streams bytes; 0 is 1.
	Streams int `json:"streams,omitempty"`
}

// UDPArgs sends datagrams to an echo server, a few at a time, and waits for the replies.
type UDPArgs struct {
	Addr    string        `json:"addr"`
	Size    int           `json:"size"` // payload bytes
	Count   int           `json:"count"`
	Seed    uint64        `json:"seed"`
	Timeout time.Duration `json:"timeout_ns"` // for the last replies
}

// HTTPArgs fetches a URL.
type HTTPArgs struct {
	URL     string        `json:"url"`
	Timeout time.Duration `json:"timeout_ns"`
}

// HTTPResult tells what came.
type HTTPResult struct {
	Status  int           `json:"status"`
	Bytes   int64         `json:"bytes"`
	CRC32C  uint32        `json:"crc32c"`
	Head    string        `json:"head"` // the first 200 bytes of the body
	Elapsed time.Duration `json:"elapsed_ns"`
}

// LookupArgs asks a name server directly.
type LookupArgs struct {
	Server  string        `json:"server"` // host:port
	Name    string        `json:"name"`
	TCP     bool          `json:"tcp,omitempty"`
	Timeout time.Duration `json:"timeout_ns"`
}

// LookupResult is the name's addresses.
type LookupResult struct {
	Addrs []string `json:"addrs"`
}

// ServeArgs starts servers in the guest that run until it halts.
type ServeArgs struct {
	Stream int `json:"stream,omitempty"` // TCP port of a stream.Serve
	Echo   int `json:"echo,omitempty"`   // UDP port of an echo server
	HTTP   int `json:"http,omitempty"`   // TCP port that answers GET /N with N bytes
}

// TrafficArgs starts, reads or stops datagrams in the background.
type TrafficArgs struct {
	Action   string        `json:"action"` // start, read, stop
	Addr     string        `json:"addr,omitempty"`
	Size     int           `json:"size,omitempty"`
	Interval time.Duration `json:"interval_ns,omitempty"`
}

// HoldArgs fills guest memory with data and keeps it until the next Hold.
type HoldArgs struct {
	MiB int `json:"mib"`
}

// FramesArgs is about whole Ethernet frames, past the guest's stack. Watch begins to look at what comes to Link; Frames sends, and then collects what has come
// since the Watch, or the last Frames, and contains Mark, until one contains Until or the time is over.
type FramesArgs struct {
	Link    string        `json:"link"`
	Send    [][]byte      `json:"send,omitempty"`
	Mark    []byte        `json:"mark,omitempty"`
	Until   []byte        `json:"until,omitempty"` // nil: nothing is collected
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// FramesResult is what came, VLAN tags included, and what the guest sent itself not.
type FramesResult struct {
	Frames [][]byte `json:"frames"`
}
