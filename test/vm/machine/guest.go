package machine

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
	"github.com/vhostd/vhostd/virtio"
)

// answerTime is what an answer may take beyond the operation's own time limit, on a busy host.
const answerTime = 30 * time.Second

// Call runs one operation of package rpc in the guest.
func (m *Machine) Call(ctx context.Context, op string, args, result any) error {
	return m.agent.call(ctx, op, args, result)
}

func call[R any](ctx context.Context, m *Machine, limit time.Duration, op string, args any) (R, error) {
	ctx, cancel := context.WithTimeout(ctx, limit+answerTime)
	defer cancel()
	var r R
	err := m.agent.call(ctx, op, args, &r)
	return r, err
}

// Exec runs a program in the guest and returns what it wrote. A non-zero exit is an error that holds it.
func (m *Machine) Exec(ctx context.Context, argv ...string) (string, error) {
	const limit = 60 * time.Second
	r, err := call[rpc.ExecResult](ctx, m, limit, rpc.OpExec, rpc.ExecArgs{Argv: argv, Timeout: limit})
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("guest: %s: exit code %d: %s", strings.Join(argv, " "), r.Code, strings.TrimSpace(r.Output))
	}
	return r.Output, err
}

// ReadFile returns a file of the guest, without space at its ends.
func (m *Machine) ReadFile(ctx context.Context, path string) (string, error) {
	r, err := call[rpc.FileResult](ctx, m, 0, rpc.OpRead, rpc.FileArgs{Path: path})
	return strings.TrimSpace(r.Data), err
}

// WriteFile writes to an existing file of the guest.
func (m *Machine) WriteFile(ctx context.Context, path, data string) error {
	_, err := call[struct{}](ctx, m, answerTime, rpc.OpWrite, rpc.FileArgs{Path: path, Data: data})
	return err
}

// Glob returns the guest's paths that match.
func (m *Machine) Glob(ctx context.Context, pattern string) ([]string, error) {
	r, err := call[rpc.GlobResult](ctx, m, 0, rpc.OpGlob, rpc.FileArgs{Path: pattern})
	return r.Paths, err
}

// Link configures an interface of the guest and returns what it is then.
func (m *Machine) Link(ctx context.Context, a rpc.LinkArgs) (rpc.LinkResult, error) {
	return call[rpc.LinkResult](ctx, m, a.Wait, rpc.OpLink, a)
}

// replyTime is how long to wait for a reply that may be lost. An emulated guest on a busy machine may stand still for seconds; where nothing is lost, waiting costs
// nothing.
const replyTime = 20 * time.Second

// Ping sends echo requests from the guest.
func (m *Machine) Ping(ctx context.Context, a rpc.PingArgs) (rpc.PingResult, error) {
	if a.Timeout == 0 {
		a.Timeout = replyTime
	}
	return call[rpc.PingResult](ctx, m, a.Timeout*time.Duration(a.Count), rpc.OpPing, a)
}

// TCP runs a transfer between the guest and a stream.Serve.
func (m *Machine) TCP(ctx context.Context, a rpc.TCPArgs) (stream.Result, error) {
	if a.Timeout == 0 {
		a.Timeout = 3 * time.Minute
	}
	return call[stream.Result](ctx, m, a.Timeout, rpc.OpTCP, a)
}

// UDP sends datagrams from the guest to an echo server.
func (m *Machine) UDP(ctx context.Context, a rpc.UDPArgs) (stream.EchoCounters, error) {
	if a.Timeout == 0 {
		a.Timeout = replyTime
	}
	return call[stream.EchoCounters](ctx, m, a.Timeout+time.Minute, rpc.OpUDP, a)
}

// HTTP fetches a URL in the guest.
func (m *Machine) HTTP(ctx context.Context, url string) (rpc.HTTPResult, error) {
	const limit = 2 * time.Minute
	return call[rpc.HTTPResult](ctx, m, limit, rpc.OpHTTP, rpc.HTTPArgs{URL: url, Timeout: limit})
}

// Lookup resolves a name in the guest.
func (m *Machine) Lookup(ctx context.Context, a rpc.LookupArgs) ([]string, error) {
	if a.Timeout == 0 {
		a.Timeout = 20 * time.Second
	}
	r, err := call[rpc.LookupResult](ctx, m, a.Timeout, rpc.OpLookup, a)
	return r.Addrs, err
}

// Serve starts servers in the guest.
func (m *Machine) Serve(ctx context.Context, a rpc.ServeArgs) error {
	_, err := call[struct{}](ctx, m, 0, rpc.OpServe, a)
	return err
}

// Traffic starts, reads or stops the guest's background datagrams.
func (m *Machine) Traffic(ctx context.Context, a rpc.TrafficArgs) (stream.EchoCounters, error) {
	return call[stream.EchoCounters](ctx, m, 0, rpc.OpTraffic, a)
}

// Hold fills that much guest memory and keeps it.
func (m *Machine) Hold(ctx context.Context, mib int) error {
	_, err := call[struct{}](ctx, m, time.Minute, rpc.OpHold, rpc.HoldArgs{MiB: mib})
	return err
}

// VirtioDevice returns the name ("virtio1") of the guest's virtio device behind a network interface.
func (m *Machine) VirtioDevice(ctx context.Context, link string) (string, error) {
	paths, err := m.Glob(ctx, "/sys/bus/virtio/devices/*/net/"+link)
	if err != nil || len(paths) != 1 {
		return "", fmt.Errorf("virtio device of %s: %q, %w", link, paths, err)
	}
	return filepath.Base(filepath.Dir(filepath.Dir(paths[0]))), nil
}

// Features returns the virtio feature bits that the guest's driver negotiated for a network interface.
func (m *Machine) Features(ctx context.Context, link string) (virtio.Features, error) {
	dev, err := m.VirtioDevice(ctx, link)
	if err != nil {
		return 0, err
	}
	// A character for each bit, bit 0 first.
	shown, err := m.ReadFile(ctx, "/sys/bus/virtio/devices/"+dev+"/features")
	var f virtio.Features
	for bit, c := range shown {
		if c == '1' {
			f |= 1 << bit
		}
	}
	return f, err
}

// Watch has the guest look at the frames that come to a link.
func (m *Machine) Watch(ctx context.Context, link string) error {
	_, err := call[struct{}](ctx, m, 0, rpc.OpWatch, rpc.FramesArgs{Link: link})
	return err
}

// Frames has the guest send frames past its stack, and collects what has come since Watch.
func (m *Machine) Frames(ctx context.Context, a rpc.FramesArgs) ([][]byte, error) {
	r, err := call[rpc.FramesResult](ctx, m, a.Timeout, rpc.OpFrames, a)
	return r.Frames, err
}
