package machine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hugelgupf/vmtest/qemu"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

const (
	portName  = rpc.Port
	pidFile   = "qemu.pid"
	rpcSocket = "rpc.sock"
	qmpSocket = "qmp.sock"
)

// Machine is one running guest.
type Machine struct {
	opts   Options
	vm     *qemu.VM
	dir    string
	agent  *agentConn
	qmp    *qmpConn
	exited chan struct{} // closed when QEMU has ended
	err    error         // how QEMU ended; after exited

	mu      sync.Mutex
	console []string
}

// Start starts QEMU. The guest is booting when it returns: WaitBoot waits for the agent. The caller calls Close.
func Start(ctx context.Context, o Options) (*Machine, error) {
	dir, err := os.MkdirTemp("", "vhostd-vm-") // short: the path of a socket has at most 107 bytes
	if err != nil {
		return nil, err
	}
	m := &Machine{opts: o.withDefaults(), dir: dir, exited: make(chan struct{})}
	if err := m.start(ctx); err != nil {
		m.Close()
		return nil, fmt.Errorf("%s: %w", m.opts.Name, err)
	}
	return m, nil
}

func (m *Machine) start(ctx context.Context) error {
	if m.opts.User != 0 {
		if err := os.Chown(m.dir, m.opts.User, m.opts.User); err != nil {
			return err
		}
	}
	rpcListener, err := m.listen(rpcSocket)
	if err != nil {
		return err
	}
	defer rpcListener.Close()
	qmpListener, err := m.listen(qmpSocket)
	if err != nil {
		return err
	}
	defer qmpListener.Close()
	m.vm, err = qemu.Start(qemu.ArchAMD64, m.opts.fns(m.dir, m.line)...)
	if err != nil {
		return err
	}
	go func() {
		m.err = m.vm.Wait() // also drains the console
		close(m.exited)
		rpcListener.Close()
		qmpListener.Close()
	}()
	return m.connect(ctx, rpcListener, qmpListener)
}

// listen opens a socket that QEMU connects to.
func (m *Machine) listen(name string) (net.Listener, error) {
	path := filepath.Join(m.dir, name)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if m.opts.User != 0 {
		err = os.Chown(path, m.opts.User, m.opts.User)
	}
	return l, err
}

// connect waits for QEMU's two connections. With a vhost-user socket they only come once the back-end is there.
func (m *Machine) connect(ctx context.Context, rpcListener, qmpListener net.Listener) error {
	stop := context.AfterFunc(ctx, func() { rpcListener.Close(); qmpListener.Close() })
	defer stop()
	conn, err := rpcListener.Accept()
	if err != nil {
		return m.startError(ctx, err)
	}
	m.agent = newAgentConn(conn)
	if conn, err = qmpListener.Accept(); err != nil {
		return m.startError(ctx, err)
	}
	m.qmp, err = newQMPConn(conn)
	return err
}

// startError says why QEMU did not connect: its own words, where it has ended.
func (m *Machine) startError(ctx context.Context, err error) error {
	select {
	case <-m.exited:
		return fmt.Errorf("QEMU ended at once (%v): %s", m.err, strings.Join(m.Console(), "\n"))
	default:
		return errors.Join(err, ctx.Err())
	}
}

func (m *Machine) line(s string) {
	m.mu.Lock()
	m.console = append(m.console, s)
	m.mu.Unlock()
	if m.opts.Console != nil {
		m.opts.Console(s)
	}
}

// Console returns the guest's console so far.
func (m *Machine) Console() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.console...)
}

// CommandLine is the QEMU command, to be run by hand.
func (m *Machine) CommandLine() string { return m.vm.CmdlineQuoted() }

// PID returns QEMU's process id.
func (m *Machine) PID() (int, error) {
	b, err := os.ReadFile(filepath.Join(m.dir, pidFile))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// Exited is closed when QEMU has ended.
func (m *Machine) Exited() <-chan struct{} { return m.exited }

// Kill ends QEMU as a crash would, and waits for its end.
func (m *Machine) Kill() {
	_ = m.vm.Kill()
	<-m.exited
}

// Quit ends QEMU in good order: it stops the device first.
func (m *Machine) Quit(ctx context.Context) error {
	if _, err := m.QMP(ctx, "quit", nil); err != nil {
		return err
	}
	select {
	case <-m.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU still runs after quit: %w", ctx.Err())
	}
}

// Close ends QEMU, if it still runs, and removes everything.
func (m *Machine) Close() {
	if m.vm != nil {
		m.Kill()
	}
	if m.agent != nil {
		m.agent.close()
	}
	if m.qmp != nil {
		m.qmp.close()
	}
	os.RemoveAll(m.dir)
}

// WaitBoot waits for the n-th start of the agent, counted from 1.
func (m *Machine) WaitBoot(ctx context.Context, n int) (rpc.Hello, error) {
	start := time.Now()
	h, err := m.agent.waitHello(ctx, n, m.exited)
	if err != nil {
		return h, fmt.Errorf("%s: boot %d not seen after %v: %w; console:\n%s", m.opts.Name, n,
			time.Since(start).Round(time.Millisecond), err, strings.Join(tail(m.Console(), 40), "\n"))
	}
	return h, nil
}

func tail(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }
